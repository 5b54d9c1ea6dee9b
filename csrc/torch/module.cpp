// fastnorm._C: questions that Python can ask about the build, the processor and the planners. Importing it registers
// the ops.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <string_view>
#include <variant>

#include "aten_switches.h"
#include "cpu/api.h"
#include "cuda/api.h"
#include "cuda_stream.h"
#include "eager_norm.h"
#include "gang_refusals.h"
#include "plan/cuda.h"
#include "plan_cache.h"

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

// values: a list of enums, each of which name_of knows.
template <class Values>
auto value_named(const std::string& what, const std::string& name, const Values& values) {
  std::string names;
  for (const auto value : values) {
    if (name == name_of(value)) return value;
    names += (names.empty() ? "" : ", ") + std::string(name_of(value));
  }
  throw std::invalid_argument(what + " is '" + name + "', expected one of " + names);
}

Geometry make_geometry(const std::string& kind_name, int64_t N, int64_t C, int64_t S, int64_t groups,
                       bool channels_last) {
  const Kind kind = value_named("kind", kind_name, std::array{Kind::kBatch, Kind::kGroup, Kind::kLayer});
  require(N >= 0 && C >= 0 && S >= 0, "a size is negative");
  const int64_t G = kind == Kind::kBatch ? C : groups;
  require(kind == Kind::kBatch || (G >= 1 && C % G == 0),
          "groups is " + std::to_string(G) + ", expected a divisor of C");
  return {kind, N, C, S, G, channels_last};
}

std::string plan(const std::string& kind, int64_t N, int64_t C, int64_t S, int64_t groups, bool channels_last,
                 const std::string& dtype, int streams, int64_t l2_bytes, int64_t l3_bytes, int threads, int outputs) {
  const Geometry g = make_geometry(kind, N, C, S, groups, channels_last);
  const CpuInfo cpu{l2_bytes, l3_bytes, threads};
  return to_string(g) + " | " + to_string(plan_cpu(g, parse_dtype(dtype), streams, outputs, cpu));
}

// The conditions that the ops check before they plan.
void check_plannable(const Geometry& g, DType dtype, int alignment) {
  require(g.numel() > 0, "the geometry has no elements");
  require(!g.sets_are_positions() || g.C > 1, "the geometry has one channel, whose positions are rows: S is 1");
  const bool known = alignment == 1 || alignment == 2 || alignment == 4 || alignment == 8 || alignment == 16;
  require(known && alignment >= size_of(dtype),
          "alignment is " + std::to_string(alignment) + ", expected a power of two from the element's size to 16");
}

Activation parse_activation(const std::string& name) {
  const auto found = std::find(std::begin(kActivationNames), std::end(kActivationNames), name);
  require(found != std::end(kActivationNames), "activation is '" + name + "', expected one of activations()");
  return static_cast<Activation>(found - std::begin(kActivationNames));
}

ForwardNeeds forward_needs(const Geometry& g, DType dtype, int alignment, bool output, bool frozen, bool residual,
                           const std::string& activation) {
  check_plannable(g, dtype, alignment);
  return {alignment, output, frozen, residual, parse_activation(activation)};
}
BackwardNeeds backward_needs(const Geometry& g, DType dtype, int alignment, bool residual, bool mask, bool frozen,
                             bool input, bool dresidual, bool params, const std::string& activation) {
  check_plannable(g, dtype, alignment);
  require(input || params, "neither input nor params is wanted");
  require(input || !dresidual, "dresidual is wanted, and input is not");
  return {alignment, residual, mask, frozen, input, dresidual, params, parse_activation(activation)};
}

// Requirements on plans: names as plans print them, and numbers.
using ForcedByName = std::map<std::string, std::variant<std::string, int>>;

PlanOptions make_options(const ForcedByName& forced, int free_sms) {
  require(free_sms >= 0, "free_sms is " + std::to_string(free_sms) + ", expected 0 or more");
  PlanOptions options;
  options.free_sms = free_sms;
  Forced& f = options.forced;
  for (const auto& [key, value] : forced) {
    const std::string* name = std::get_if<std::string>(&value);
    int* number = nullptr;
    for_each_field(f, [&, &key = key](std::string_view field, int& slot) {
      if (field == key) number = &slot;
    });
    bool is_enum = false;
    const auto take = [&, &key = key](int& slot, auto values) {
      if (&slot != number) return;
      is_enum = true;
      if (name) slot = static_cast<int>(value_named("forced " + key, *name, values));
    };
    take(f.strategy, std::initializer_list{Strategy::kFused, Strategy::kSplit, Strategy::kApply});
    take(f.gang, std::initializer_list{Gang::kBlock, Gang::kCluster, Gang::kGrid});
    take(f.place, std::initializer_list{Place::kShared, Place::kRegisters});
    take(f.exchange, std::initializer_list{Exchange::kGather, Exchange::kScatter});
    take(f.traversal, std::initializer_list{Traversal::kRows, Traversal::kColumns});
    require(number && is_enum == (name != nullptr),
            "forced has '" + key +
                "', expected names of strategy, gang, place, exchange and traversal, numbers of pieces, stages, "
                "blocks_per_sm, tile_bytes and staged_length");
    if (is_enum) continue;
    *number = std::get<int>(value);
    require(*number >= 1, "forced " + key + " is " + std::to_string(*number) + ", expected 1 or more");
  }
  require(f.stages <= 2, "forced stages is " + std::to_string(f.stages) + ", expected 1 or 2");
  return options;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.emplace_back(k->name);
  return names;
}

std::vector<std::string> activations() { return {std::begin(kActivationNames), std::end(kActivationNames)}; }
std::vector<std::string> two_sided_activations() {
  std::vector<std::string> names;
  for (int code = 0; code < kActivations; ++code) {
    if (is_two_sided(static_cast<Activation>(code))) names.emplace_back(kActivationNames[code]);
  }
  return names;
}

#if defined(FASTNORM_CUDA_BUILD)
// Needs a context of the device: the driver is asked which clusters fit.
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

// A field as Python has it: the name of an enum, else the value itself.
template <class T>
auto to_python(const T& value) {
  if constexpr (std::is_enum_v<T>) {
    return name_of(value);
  } else {
    return value;
  }
}

// Field i of a struct, as fields() lists them.
template <class Struct, size_t i>
using FieldOf = std::decay_t<std::tuple_element_t<i, decltype(fields(std::declval<Struct&>()))>>;
template <class Struct, size_t i>
const std::string& name_of_field_at() {
  static const std::string name(name_of_field(names_of_fields(std::type_identity<Struct>{}), i));
  return name;
}

// Every field as a read-only property, and ==.
template <class Struct, size_t... i>
void def_fields(py::class_<Struct>& c, std::index_sequence<i...>) {
  (c.def_property_readonly(name_of_field_at<Struct, i>().c_str(),
                           [](const Struct& s) { return to_python(std::get<i>(fields(s))); }),
   ...);
  if constexpr (std::equality_comparable<Struct>) c.def(py::self == py::self);
}
template <class Struct>
using FieldIndices = std::make_index_sequence<std::tuple_size_v<decltype(fields(std::declval<Struct&>()))>>;
template <class Struct>
py::class_<Struct> bind_fields(py::module_& m, const char* name) {
  py::class_<Struct> c(m, name);
  def_fields(c, FieldIndices<Struct>{});
  return c;
}
// And a constructor that takes all of them, by name or in order.
template <class Struct, size_t... i>
void def_init(py::class_<Struct>& c, std::index_sequence<i...>) {
  c.def(py::init<FieldOf<Struct, i>...>(), py::arg(name_of_field_at<Struct, i>().c_str())...);
}

void add_planner(py::module_& m) {
  bind_fields<Geometry>(m, "Geometry")
      .def(py::init(&make_geometry), py::arg("kind"), py::arg("N"), py::arg("C"), py::arg("S"), py::arg("groups") = 1,
           py::arg("channels_last") = false)
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
      .def("__repr__", [](const Geometry& g) { return to_string(g); });
  auto device = bind_fields<DeviceInfo>(m, "DeviceInfo");
  def_init(device, FieldIndices<DeviceInfo>{});
  bind_fields<Estimate>(m, "Estimate").def_property_readonly("total", &Estimate::total);
  bind_fields<Grid>(m, "Grid").def_property_readonly("threads", &Grid::threads);
  bind_fields<Units>(m, "Units");
  bind_fields<ForwardPlan>(m, "ForwardPlan").def("__repr__", [](const ForwardPlan& p) { return to_string(p); });
  bind_fields<BackwardPlan>(m, "BackwardPlan")
      .def_property_readonly("workspace_bytes", &BackwardPlan::workspace_bytes)
      .def("__repr__", [](const BackwardPlan& p) { return to_string(p); });
  m.def("cuda_device_info", &cuda_device_info, "The facts of a GPU of this machine.", py::arg("index") = 0);
  // One plan, the cheapest, or all that were compared.
  const auto def_forward = [&](const char* name, const char* doc, auto plan) {
    m.def(
        name,
        [plan](const Geometry& g, const std::string& dtype, const DeviceInfo& device, int alignment, bool output,
               bool frozen, bool residual, const std::string& activation, const ForcedByName& forced, int free_sms) {
          const DType type = parse_dtype(dtype);
          return plan(g, type, forward_needs(g, type, alignment, output, frozen, residual, activation), device,
                      make_options(forced, free_sms));
        },
        doc, py::arg("geometry"), py::arg("dtype"), py::arg("device"), py::kw_only(), py::arg("alignment") = 16,
        py::arg("output") = true, py::arg("frozen") = false, py::arg("residual") = false,
        py::arg("activation") = "none", py::arg("forced") = ForcedByName{}, py::arg("free_sms") = 0);
  };
  const auto def_backward = [&](const char* name, const char* doc, auto plan) {
    m.def(
        name,
        [plan](const Geometry& g, const std::string& dtype, const DeviceInfo& device, int alignment, bool residual,
               bool mask, bool frozen, bool input, bool dresidual, bool params, const std::string& activation,
               const ForcedByName& forced, int free_sms) {
          const DType type = parse_dtype(dtype);
          return plan(g, type,
                      backward_needs(g, type, alignment, residual, mask, frozen, input, dresidual, params, activation),
                      device, make_options(forced, free_sms));
        },
        doc, py::arg("geometry"), py::arg("dtype"), py::arg("device"), py::kw_only(), py::arg("alignment") = 16,
        py::arg("residual") = false, py::arg("mask") = false, py::arg("frozen") = false, py::arg("input") = true,
        py::arg("dresidual") = false, py::arg("params") = true, py::arg("activation") = "none",
        py::arg("forced") = ForcedByName{}, py::arg("free_sms") = 0);
  };
  def_forward("plan_forward", "How a forward call is cut into CUDA launches.", &plan_forward);
  def_backward("plan_backward", "How a backward call is cut into CUDA launches.", &plan_backward);
  def_forward("compare_forward", "All plans of a forward call that the planner compares, cheapest first.",
              &compare_forward);
  def_backward("compare_backward", "All plans of a backward call that the planner compares, cheapest first.",
               &compare_backward);
  m.def(
      "set_plan_options",
      [](const ForcedByName& forced, int free_sms) { ops::shared_options().set(make_options(forced, free_sms)); },
      "Sets what all CUDA calls from now on are planned with.", py::kw_only(), py::arg("forced") = ForcedByName{},
      py::arg("free_sms") = 0);
  m.def(
      "pack_width",
      [](const Geometry& g, const std::string& dtype, int alignment) {
        check_plannable(g, parse_dtype(dtype), alignment);
        return pack_width(g, parse_dtype(dtype), alignment);
      },
      "Elements of the widest access that divides every run and keeps every address aligned.", py::arg("geometry"),
      py::arg("dtype"), py::arg("alignment") = 16);
}

void set_aten_switch(const std::string& norm, const std::string& device, bool on) {
  const ops::AtenNorm n = value_named("norm", norm, ops::kAtenNorms);
  const ops::AtenDevice d = value_named("device", device, ops::kAtenDevices);
  if (on) ops::register_aten_kernels();
  ops::aten_switch(n, d).set(on);
}

using AtenRow = std::tuple<std::string, std::string, bool, int64_t, std::map<std::string, int64_t>>;

std::vector<AtenRow> aten_switches() {
  std::vector<AtenRow> rows;
  for (const ops::AtenNorm norm : ops::kAtenNorms) {
    for (const ops::AtenDevice device : ops::kAtenDevices) {
      const auto& s = ops::aten_switch(norm, device);
      rows.emplace_back(name_of(norm), name_of(device), s.is_on(), s.served(), s.left());
    }
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  cpu::kernels();  // a bad FASTNORM_CPU is reported on import
  m.def("build_info", &build_info,
        "The version, torch, compiler, instruction sets and CUDA that this extension was built with.");
  m.def("cpu_capability", [] { return std::string(cpu::kernels().name); }, "The instruction set in use.");
  m.def("cpu_capabilities", &capabilities,
        "The instruction sets that this build and this processor can both run, best first.");
  m.def(
      "refused_gangs", [] { return ops::refused_gangs().load(); },
      "How many CUDA launches whose blocks wait for each other were refused and replaced by slower plans.");
  m.def("has_stream", &has_cuda_stream, "Whether the torch that is loaded has CUDA streams.");
  m.def("activations", &activations, "The names of the ops' `activation` argument: number i is the name at i.");
  m.def("two_sided_activations", &two_sided_activations,
        "Those whose derivative is one of two constants, so that one bit an element tells it.");
  m.attr("STATS_ROWS") = static_cast<int>(kStatsRows);
  m.attr("MAX_IMAGE_CHANNELS") = static_cast<int>(kMaxImageChannels);
  m.def("plan", &plan, "How a call on the CPU is cut into tasks, on one line.", py::arg("kind"), py::arg("N"),
        py::arg("C"), py::arg("S"), py::arg("groups"), py::arg("channels_last"), py::arg("dtype"), py::arg("streams"),
        py::arg("l2_bytes"), py::arg("l3_bytes"), py::arg("threads"), py::arg("outputs") = 1);
  m.def("set_aten_switch", &set_aten_switch, "Whether our kernels answer aten's own operators of a norm on a device.",
        py::arg("norm"), py::arg("device"), py::arg("on"));
  m.def("aten_switches", &aten_switches,
        "For each norm and device: the names, whether the switch is on, calls served, calls left to torch by reason.");
  m.def(
      "make_eager_norm",
      [](const py::object& op) { return py::reinterpret_steal<py::object>(ops::make_eager_norm(op.ptr())); },
      "The operator `norm`, for eager calls.", py::arg("op"));
  add_planner(m);
}
