// How the ops refuse a call that the kernels do not serve.
#pragma once

#include <c10/util/Exception.h>

#define FASTNORM_SUPPORTED(condition, ...) TORCH_CHECK_NOT_IMPLEMENTED(condition, "fastnorm: ", __VA_ARGS__)
