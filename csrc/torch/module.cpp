// fastnorm._C: what Python may ask about the build, the processor and the planners. Importing it registers the ops.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <variant>

#include "cpu/api.h"
#include "cuda/api.h"
#include "cuda_stream.h"
#include "plan/cuda.h"
#include "plan_options.h"

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

ForwardNeeds forward_needs(const Geometry& g, DType dtype, int alignment, bool output, bool frozen) {
  check_plannable(g, dtype, alignment);
  return {alignment, output, frozen};
}
BackwardNeeds backward_needs(const Geometry& g, DType dtype, int alignment, bool residual, bool frozen, bool input,
                             bool params) {
  check_plannable(g, dtype, alignment);
  require(input || params, "neither input nor params is wanted");
  return {alignment, residual, frozen, input, params};
}

// Names as plans print them, numbers as they are.
using ForcedByName = std::map<std::string, std::variant<std::string, int>>;

template <class Enum>
int value_named(const std::string& key, const std::string& name, std::initializer_list<Enum> values) {
  for (const Enum value : values) {
    if (name == name_of(value)) return static_cast<int>(value);
  }
  throw std::invalid_argument("forced " + key + " is '" + name + "', which there is not");
}

PlanOptions make_options(const ForcedByName& forced, int free_sms) {
  require(free_sms >= 0, "free_sms is " + std::to_string(free_sms) + ", expected 0 or more");
  PlanOptions options;
  options.free_sms = free_sms;
  Forced& f = options.forced;
  const std::map<std::string, int*> numbers = {
      {"pieces", &f.pieces}, {"stages", &f.stages}, {"blocks_per_sm", &f.blocks_per_sm}, {"tile_bytes", &f.tile_bytes}};
  for (const auto& [key, value] : forced) {
    const std::string* name = std::get_if<std::string>(&value);
    const auto number = numbers.find(key);
    if (key == "strategy" && name) {
      f.strategy = value_named(key, *name, {Strategy::kFused, Strategy::kSplit, Strategy::kApply});
    } else if (key == "gang" && name) {
      f.gang = value_named(key, *name, {Gang::kBlock, Gang::kCluster, Gang::kGrid});
    } else {
      require(number != numbers.end() && !name,
              "forced has '" + key +
                  "', expected names of strategy and gang, numbers of pieces, stages, blocks_per_sm and "
                  "tile_bytes");
      *number->second = std::get<int>(value);
      require(*number->second >= 1,
              "forced " + key + " is " + std::to_string(*number->second) + ", expected 1 or more");
    }
  }
  require(f.stages <= 2, "forced stages is " + std::to_string(f.stages) + ", expected 1 or 2");
  return options;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.emplace_back(k->name);
  return names;
}

#if defined(FASTNORM_CUDA_BUILD)
// Of the current device's context: the driver is asked what clusters it takes.
DeviceInfo cuda_device_info(int index) {
  DeviceInfo info{};
  const int error = cuda::device_info(index, &info);
  if (error != 0) throw std::runtime_error(std::string("CUDA error: ") + cuda::error_string(error));
  return info;
}
#else
#define FASTNORM_CUDA_BUILD "none"
DeviceInfo cuda_device_info(int) { throw std::runtime_error("this build has no CUDA kernels"); }
#endif

std::map<std::string, std::string> build_info() {
  return {{"version", FASTNORM_VERSION},
          {"torch", FASTNORM_TORCH_VERSION},
          {"compiler", FASTNORM_COMPILER},
          {"cpu_capabilities", FASTNORM_CPU_CAPABILITIES},
          {"cuda", FASTNORM_CUDA_BUILD}};
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
      .def(py::init<int, int, int, int64_t, int64_t, int64_t, int64_t, int, int, bool>(), py::arg("capability"),
           py::arg("num_sms"), py::arg("threads_per_sm"), py::arg("shared_per_sm"), py::arg("shared_per_block"),
           py::arg("l2_bytes"), py::arg("bytes_per_us"), py::arg("largest_cluster"), py::arg("cluster_sms"),
           py::arg("cooperative"))
      .def_readonly("capability", &DeviceInfo::capability)
      .def_readonly("num_sms", &DeviceInfo::num_sms)
      .def_readonly("threads_per_sm", &DeviceInfo::threads_per_sm)
      .def_readonly("shared_per_sm", &DeviceInfo::shared_per_sm)
      .def_readonly("shared_per_block", &DeviceInfo::shared_per_block)
      .def_readonly("l2_bytes", &DeviceInfo::l2_bytes)
      .def_readonly("bytes_per_us", &DeviceInfo::bytes_per_us)
      .def_readonly("largest_cluster", &DeviceInfo::largest_cluster)
      .def_readonly("cluster_sms", &DeviceInfo::cluster_sms)
      .def_readonly("cooperative", &DeviceInfo::cooperative);
  py::class_<Estimate>(m, "Estimate")
      .def_readonly("memory", &Estimate::memory)
      .def_readonly("barriers", &Estimate::barriers)
      .def_readonly("launches", &Estimate::launches)
      .def_property_readonly("total", &Estimate::total);
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
      .def_property_readonly("gang", [](const Grid& g) { return name_of(g.gang); })
      .def_readonly("stages", &Grid::stages)
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
      .def_readonly("launches", &ForwardPlan::launches)
      .def_readonly("estimate", &ForwardPlan::estimate)
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
      .def_readonly("gang_bytes", &BackwardPlan::gang_bytes)
      .def_property_readonly("workspace_bytes", &BackwardPlan::workspace_bytes)
      .def_readonly("grid_sync", &BackwardPlan::grid_sync)
      .def_readonly("launches", &BackwardPlan::launches)
      .def_readonly("estimate", &BackwardPlan::estimate)
      .def(py::self == py::self)
      .def("__repr__", [](const BackwardPlan& p) { return to_string(p); });
  m.def("cuda_device_info", &cuda_device_info, "The facts of a GPU of this machine.", py::arg("index") = 0);
  // One plan, the cheapest, or all that were compared.
  const auto def_forward = [&](const char* name, const char* doc, auto plan) {
    m.def(
        name,
        [plan](const Geometry& g, const std::string& dtype, const DeviceInfo& device, int alignment, bool output,
               bool frozen, const ForcedByName& forced, int free_sms) {
          const DType type = parse_dtype(dtype);
          return plan(g, type, forward_needs(g, type, alignment, output, frozen), device,
                      make_options(forced, free_sms));
        },
        doc, py::arg("geometry"), py::arg("dtype"), py::arg("device"), py::kw_only(), py::arg("alignment") = 16,
        py::arg("output") = true, py::arg("frozen") = false, py::arg("forced") = ForcedByName{},
        py::arg("free_sms") = 0);
  };
  const auto def_backward = [&](const char* name, const char* doc, auto plan) {
    m.def(
        name,
        [plan](const Geometry& g, const std::string& dtype, const DeviceInfo& device, int alignment, bool residual,
               bool frozen, bool input, bool params, const ForcedByName& forced, int free_sms) {
          const DType type = parse_dtype(dtype);
          return plan(g, type, backward_needs(g, type, alignment, residual, frozen, input, params), device,
                      make_options(forced, free_sms));
        },
        doc, py::arg("geometry"), py::arg("dtype"), py::arg("device"), py::kw_only(), py::arg("alignment") = 16,
        py::arg("residual") = false, py::arg("frozen") = false, py::arg("input") = true, py::arg("params") = true,
        py::arg("forced") = ForcedByName{}, py::arg("free_sms") = 0);
  };
  def_forward("plan_forward", "How a forward call is cut into CUDA launches.", &plan_forward);
  def_backward("plan_backward", "How a backward call is cut into CUDA launches.", &plan_backward);
  def_forward("compare_forward", "All plans of a forward call, cheapest first.", &compare_forward);
  def_backward("compare_backward", "All plans of a backward call, cheapest first.", &compare_backward);
  m.def(
      "set_plan_options",
      [](const ForcedByName& forced, int free_sms) { plan_options() = make_options(forced, free_sms); },
      "What all CUDA calls from now on are planned with; no call may be under way.", py::kw_only(),
      py::arg("forced") = ForcedByName{}, py::arg("free_sms") = 0);
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
  m.attr("STATS_ROWS") = static_cast<int>(kStatsRows);
  m.def(
      "activations", [] { return std::vector<std::string>(std::begin(kActivationNames), std::end(kActivationNames)); },
      "The names of the activations, by their numbers in the operators; the first is none.");
  m.def(
      "two_sided_activations",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < kActivations; ++i) {
          if (is_two_sided(static_cast<Activation>(i))) names.emplace_back(kActivationNames[i]);
        }
        return names;
      },
      "Those whose derivative is one of two constants: with a residual they save a mask.");
  m.def("refused_gangs", [] { return 0; });
  m.def("has_stream", &has_cuda_stream, "Whether the torch that is loaded has CUDA streams.");
  m.def("plan", &plan, "How a call on the CPU is cut into tasks, on one line.", py::arg("kind"), py::arg("N"),
        py::arg("C"), py::arg("S"), py::arg("groups"), py::arg("channels_last"), py::arg("dtype"), py::arg("streams"),
        py::arg("l2_bytes"), py::arg("l3_bytes"), py::arg("threads"));
  add_planner(m);
}
