// The storage types that the variant has kernels of: all but those of FASTNORM_ABSENT, such as "ABSENT(double)".
#include <stdexcept>

#include "cuda/launches.h"
#include "drive_cases.h"

namespace fastnorm {

namespace cuda {

int absent() { throw std::logic_error("a launch of a storage type that is not compiled"); }

#define ABSENT_TRAVERSAL(T, kTraversal)                                                    \
  template <>                                                                              \
  int forward_of<T, kTraversal>(const ForwardArgs&, const ForwardPlan&, void*, void*) {    \
    return absent();                                                                       \
  }                                                                                        \
  template <>                                                                              \
  int backward_of<T, kTraversal>(const BackwardArgs&, const BackwardPlan&, void*, void*) { \
    return absent();                                                                       \
  }
#define ABSENT(T)                                                                        \
  ABSENT_TRAVERSAL(T, Traversal::kRows)                                                  \
  ABSENT_TRAVERSAL(T, Traversal::kColumns)                                               \
  template <>                                                                            \
  int forward_positions_of<T>(const ForwardArgs&, const ForwardPlan&, void*) {           \
    return absent();                                                                     \
  }                                                                                      \
  template <>                                                                            \
  int backward_positions_of<T>(const BackwardArgs&, const BackwardPlan&, void*, void*) { \
    return absent();                                                                     \
  }
FASTNORM_ABSENT
#undef ABSENT

}  // namespace cuda

namespace drive {

bool has_kernels(DType dtype) {
  return dispatch(dtype, [](auto tag) {
    using T [[maybe_unused]] = typename decltype(tag)::type;
#define ABSENT(Absent) &&!std::is_same_v<T, Absent>
    return true FASTNORM_ABSENT;
#undef ABSENT
  });
}

}  // namespace drive
}  // namespace fastnorm
