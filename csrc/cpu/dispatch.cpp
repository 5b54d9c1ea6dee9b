// Picks the kernels for this processor once, at load time. FASTNORM_CPU overrides the choice.
#include "api.h"

#include <cstdlib>
#include <stdexcept>

namespace fastnorm {

namespace baseline {
extern const cpu::Kernels kernels;
}
#if defined(FASTNORM_HAVE_AVX2)
namespace avx2 {
extern const cpu::Kernels kernels;
}
#endif
#if defined(FASTNORM_HAVE_AVX512)
namespace avx512 {
extern const cpu::Kernels kernels;
}
#endif

namespace cpu {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(FASTNORM_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back(&avx512::kernels);
  }
#endif
#if defined(FASTNORM_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&avx2::kernels);
  }
#endif
  found.push_back(&baseline::kernels);
  return found;
}

static const Kernels* choose() {
  const std::vector<const Kernels*> found = available_kernels();
  const char* wanted = std::getenv("FASTNORM_CPU");
  if (wanted == nullptr || *wanted == '\0') return found.front();
  std::string names;
  for (const Kernels* k : found) {
    if (std::string(wanted) == k->name) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument(
      "fastnorm: FASTNORM_CPU=" + std::string(wanted) +
      " is not an instruction set that this build and processor can run; expected one of: " + names);
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace cpu
}  // namespace fastnorm
