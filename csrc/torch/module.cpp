// fastnorm._C: what Python may ask about the build, the processor and the planners. Importing it registers the ops.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "../cpu/dispatch.h"
#include "cuda_stream.h"

namespace py = pybind11;
using namespace fastnorm;

namespace {

void require(bool condition, const std::string& text) {
  if (!condition) throw std::invalid_argument(text);
}

DType parse_dtype(const std::string& name) {
  for (const DType d : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    if (name == name_of(d)) return d;
  }
  throw std::invalid_argument("dtype is '" + name + "', expected float32, float64, bfloat16 or float16");
}

Geometry make_geometry(int kind, int64_t N, int64_t C, int64_t S, int64_t groups, bool channels_last) {
  require(kind >= 0 && kind <= 2, "kind is " + std::to_string(kind) + ", expected 0 (batch), 1 (group) or 2 (layer)");
  require(N >= 0 && C >= 0 && S >= 0, "a size is negative");
  const int64_t G = kind == 0 ? C : groups;
  require(kind == 0 || (G >= 1 && C % G == 0), "groups is " + std::to_string(G) + ", expected a divisor of C");
  return {static_cast<Kind>(kind), N, C, S, G, channels_last};
}

std::string plan(int kind, int64_t N, int64_t C, int64_t S, int64_t groups, bool channels_last,
                 const std::string& dtype, int streams, int64_t l2_bytes, int64_t l3_bytes, int threads) {
  const Geometry g = make_geometry(kind, N, C, S, groups, channels_last);
  return to_string(g) + " | " + to_string(plan_cpu(g, parse_dtype(dtype), streams, {l2_bytes, l3_bytes, threads}));
}

// What the ops make sure of before they plan.
void check_plannable(const Geometry& g, DType dtype, int alignment) {
  require(g.numel() > 0, "the geometry has no elements");
  const bool known = alignment == 1 || alignment == 2 || alignment == 4 || alignment == 8 || alignment == 16;
  require(known && alignment >= size_of(dtype),
          "alignment is " + std::to_string(alignment) + ", expected a power of two from the element's size to 16");
}

ForwardPlan plan_cuda_forward(const Geometry& g, const std::string& dtype, const DeviceInfo& device, int alignment,
                              bool output, bool frozen) {
  check_plannable(g, parse_dtype(dtype), alignment);
  return plan_forward(g, parse_dtype(dtype), {alignment, output, frozen}, device);
}

BackwardPlan plan_cuda_backward(const Geometry& g, const std::string& dtype, const DeviceInfo& device, int alignment,
                                bool residual, bool frozen, bool input, bool params) {
  check_plannable(g, parse_dtype(dtype), alignment);
  require(input || params, "neither input nor params is wanted");
  return plan_backward(g, parse_dtype(dtype), {alignment, residual, frozen, input, params}, device);
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.emplace_back(k->name);
  return names;
}

#if !defined(FASTNORM_CUDA_BUILD)
#define FASTNORM_CUDA_BUILD "none"
#endif

std::map<std::string, std::string> build_info() {
  return {{"version", FASTNORM_VERSION},
          {"torch", FASTNORM_TORCH_VERSION},
          {"compiler", FASTNORM_COMPILER},
          {"cpu_capabilities", FASTNORM_CPU_CAPABILITIES},
          {"cuda", FASTNORM_CUDA_BUILD}};
}

const char* name_of(Traversal traversal) { return traversal == Traversal::kRows ? "rows" : "columns"; }
const char* name_of(Strategy s) { return s == Strategy::kFused ? "fused" : s == Strategy::kSplit ? "split" : "apply"; }
const char* name_of(ParamSums s) {
  return s == ParamSums::kNone     ? "none"
         : s == ParamSums::kShared ? "shared"
         : s == ParamSums::kAlong  ? "along"
                                   : "apart";
}

void add_planner(py::module_& m) {
  py::class_<Geometry>(m, "Geometry")
      .def(py::init(&make_geometry), py::arg("kind"), py::arg("N"), py::arg("C"), py::arg("S"), py::arg("groups") = 1,
           py::arg("channels_last") = false)
      .def_property_readonly("kind", [](const Geometry& g) { return static_cast<int>(g.kind); })
      .def_readonly("N", &Geometry::N)
      .def_readonly("C", &Geometry::C)
      .def_readonly("S", &Geometry::S)
      .def_readonly("G", &Geometry::G)
      .def_readonly("channels_last", &Geometry::channels_last)
      .def_property_readonly("D", &Geometry::D)
      .def_property_readonly("numel", &Geometry::numel)
      .def_property_readonly("sets", &Geometry::sets)
      .def_property_readonly("set_size", &Geometry::set_size)
      .def_property_readonly("set_channels", &Geometry::set_channels)
      .def_property_readonly("per_element", &Geometry::per_element)
      .def_property_readonly("traversal", [](const Geometry& g) { return name_of(g.traversal()); })
      .def_property_readonly("mask_run", &Geometry::mask_run)
      .def_property_readonly("outer", &Geometry::outer)
      .def_property_readonly("positions", &Geometry::positions)
      .def(py::self == py::self)
      .def("__repr__", [](const Geometry& g) { return to_string(g); });
  py::class_<DeviceInfo>(m, "DeviceInfo")
      .def(py::init<int, int, int, int64_t, int64_t, int64_t>(), py::arg("capability"), py::arg("multiprocessors"),
           py::arg("threads_per_multiprocessor"), py::arg("shared_per_multiprocessor"), py::arg("shared_per_block"),
           py::arg("l2_bytes"))
      .def_readonly("capability", &DeviceInfo::capability)
      .def_readonly("multiprocessors", &DeviceInfo::multiprocessors)
      .def_readonly("threads_per_multiprocessor", &DeviceInfo::threads_per_multiprocessor)
      .def_readonly("shared_per_multiprocessor", &DeviceInfo::shared_per_multiprocessor)
      .def_readonly("shared_per_block", &DeviceInfo::shared_per_block)
      .def_readonly("l2_bytes", &DeviceInfo::l2_bytes);
  py::class_<Grid>(m, "Grid")
      .def_property_readonly("traversal", [](const Grid& g) { return name_of(g.traversal); })
      .def_readonly("pack", &Grid::pack)
      .def_readonly("threads_x", &Grid::threads_x)
      .def_readonly("threads_y", &Grid::threads_y)
      .def_property_readonly("threads", &Grid::threads)
      .def_readonly("pieces", &Grid::pieces)
      .def_readonly("piece_runs", &Grid::piece_runs)
      .def_readonly("piece_length", &Grid::piece_length)
      .def_readonly("tile", &Grid::tile)
      .def_readonly("items", &Grid::items)
      .def_readonly("blocks", &Grid::blocks)
      .def_readonly("shared_bytes", &Grid::shared_bytes)
      .def_readonly("team_bytes", &Grid::team_bytes)
      .def(py::self == py::self);
  py::class_<Units>(m, "Units")
      .def_readonly("threads", &Units::threads)
      .def_readonly("segments", &Units::segments)
      .def_readonly("length", &Units::length)
      .def(py::self == py::self);
  py::class_<ForwardPlan>(m, "ForwardPlan")
      .def_property_readonly("strategy", [](const ForwardPlan& p) { return name_of(p.strategy); })
      .def_readonly("grid", &ForwardPlan::grid)
      .def_readonly("workspace_bytes", &ForwardPlan::workspace_bytes)
      .def(py::self == py::self)
      .def("__repr__", [](const ForwardPlan& p) { return to_string(p); });
  py::class_<BackwardPlan>(m, "BackwardPlan")
      .def_property_readonly("strategy", [](const BackwardPlan& p) { return name_of(p.strategy); })
      .def_property_readonly("param_sums", [](const BackwardPlan& p) { return name_of(p.param_sums); })
      .def_readonly("cells", &BackwardPlan::cells)
      .def_readonly("reduce", &BackwardPlan::reduce)
      .def_readonly("apply", &BackwardPlan::apply)
      .def_readonly("params", &BackwardPlan::params)
      .def_readonly("units", &BackwardPlan::units)
      .def_readonly("sums_bytes", &BackwardPlan::sums_bytes)
      .def_readonly("params_bytes", &BackwardPlan::params_bytes)
      .def_readonly("terms_bytes", &BackwardPlan::terms_bytes)
      .def_property_readonly("workspace_bytes", &BackwardPlan::workspace_bytes)
      .def(py::self == py::self)
      .def("__repr__", [](const BackwardPlan& p) { return to_string(p); });
  m.def("plan_forward", &plan_cuda_forward, "How a forward call is cut into CUDA launches.", py::arg("geometry"),
        py::arg("dtype"), py::arg("device"), py::kw_only(), py::arg("alignment") = 16, py::arg("output") = true,
        py::arg("frozen") = false);
  m.def("plan_backward", &plan_cuda_backward, "How a backward call is cut into CUDA launches.", py::arg("geometry"),
        py::arg("dtype"), py::arg("device"), py::kw_only(), py::arg("alignment") = 16, py::arg("residual") = false,
        py::arg("frozen") = false, py::arg("input") = true, py::arg("params") = true);
  m.def(
      "pack_width",
      [](const Geometry& g, const std::string& dtype, int alignment) {
        check_plannable(g, parse_dtype(dtype), alignment);
        return pack_width(g, parse_dtype(dtype), alignment);
      },
      "Elements of the widest access that divides every run and keeps every address aligned.", py::arg("geometry"),
      py::arg("dtype"), py::arg("alignment") = 16);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  cpu::kernels();  // a bad FASTNORM_CPU is reported on import
  m.def("build_info", &build_info,
        "Version, torch, compiler, instruction sets and CUDA this extension was built with.");
  m.def("cpu_capability", [] { return std::string(cpu::kernels().name); }, "The instruction set in use.");
  m.def("cpu_capabilities", &capabilities, "Those this build and this processor can run, best first.");
  m.def("has_stream", &has_cuda_stream, "Whether the torch that is loaded has CUDA streams.");
  m.def("plan", &plan, "How a call on the CPU is cut into tasks, on one line.", py::arg("kind"), py::arg("N"),
        py::arg("C"), py::arg("S"), py::arg("groups"), py::arg("channels_last"), py::arg("dtype"), py::arg("streams"),
        py::arg("l2_bytes"), py::arg("l3_bytes"), py::arg("threads"));
  add_planner(m);
}
