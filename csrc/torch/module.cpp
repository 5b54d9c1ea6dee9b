// fastnorm._C: what Python may ask about the build, the processor and the planner. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "../cpu/dispatch.h"

namespace py = pybind11;
using namespace fastnorm;

namespace {

DType parse_dtype(const std::string& name) {
  for (const DType d : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    if (name == name_of(d)) return d;
  }
  throw std::invalid_argument("dtype is '" + name + "', expected float32, float64, bfloat16 or float16");
}

std::string plan(int kind, int64_t N, int64_t C, int64_t S, int64_t groups, bool channels_last,
                 const std::string& dtype, int streams, int64_t l2_bytes, int64_t l3_bytes, int threads) {
  const Geometry g{static_cast<Kind>(kind), N, C, S, kind == 0 ? C : groups, channels_last};
  return to_string(g) + " | " + to_string(plan_cpu(g, parse_dtype(dtype), streams, {l2_bytes, l3_bytes, threads}));
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.emplace_back(k->name);
  return names;
}

std::map<std::string, std::string> build_info() {
  return {{"version", FASTNORM_VERSION},
          {"torch", FASTNORM_TORCH_VERSION},
          {"compiler", FASTNORM_COMPILER},
          {"cpu_capabilities", FASTNORM_CPU_CAPABILITIES}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  cpu::kernels();  // a bad FASTNORM_CPU is reported on import
  m.def("build_info", &build_info, "Version, torch, compiler and instruction sets this extension was built with.");
  m.def("cpu_capability", [] { return std::string(cpu::kernels().name); }, "The instruction set in use.");
  m.def("cpu_capabilities", &capabilities, "Those this build and this processor can run, best first.");
  m.def("plan", &plan, "How a call is cut into tasks, on one line.", py::arg("kind"), py::arg("N"), py::arg("C"),
        py::arg("S"), py::arg("groups"), py::arg("channels_last"), py::arg("dtype"), py::arg("streams"),
        py::arg("l2_bytes"), py::arg("l3_bytes"), py::arg("threads"));
}
