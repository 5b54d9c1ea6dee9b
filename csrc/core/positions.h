// Layer norm over the channels of planar maps, seen as columns.
#pragma once

#include "geometry.h"

namespace fastnorm {

// The positions of a sample lie side by side, as the channels of channels_last maps do, and each is a set of its own;
// its elements, one of every channel, lie one below the other, as positions do there. Weight and bias belong to the
// rows. (Where Geometry::sets_are_positions; C > 1.)
inline Geometry positions_as_columns(const Geometry& g) { return {Kind::kGroup, g.N, g.S, g.C, g.S, true}; }

}  // namespace fastnorm
