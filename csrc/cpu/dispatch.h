// Which instruction sets this build and this processor can run.
#pragma once

#include <string>
#include <vector>

#include "../kernels.h"

namespace fastnorm::cpu {

// Best first; never empty.
std::vector<const Kernels*> available_kernels();

}  // namespace fastnorm::cpu
