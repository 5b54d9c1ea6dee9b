// The launches of layer norm over the channels of planar maps, of one storage type (forward_positions.cu and
// backward_positions.cu define them). Plain C++, so that dispatch.cpp can pick one.
#pragma once

#include "api.h"

namespace fastnorm::cuda {

template <class T>
int forward_positions_of(const ForwardArgs& args, const ForwardPlan& plan, void* stream);
template <class T>
int backward_positions_of(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream);

}  // namespace fastnorm::cuda
