#pragma once

#include "core/activation.h"

namespace fastnorm {

struct ElementWork {
  double registers, shared, reduce, apply;
};
constexpr ElementWork kElementWork[2][3][2] = {
    {{{20.0, 43.0, 30.0, 15.0}, {20.0, 70.0, 40.0, 20.0}},
     {{20.0, 70.0, 40.0, 20.0}, {20.0, 90.0, 50.0, 25.0}},
     {{20.0, 60.0, 30.0, 15.0}, {20.0, 60.0, 30.0, 15.0}}},
    {{{20.0, 98.0, 50.0, 25.0}, {20.0, 134.0, 60.0, 30.0}},
     {{20.0, 90.0, 60.0, 30.0}, {20.0, 130.0, 60.0, 30.0}},
     {{20.0, 65.0, 30.0, 25.0}, {20.0, 84.0, 40.0, 25.0}}},
};
constexpr double kNarrowPacks[2][2][3] = {{{1.5, 3.0, 3.0}, {1.0, 2.0, 2.0}}, {{1.5, 3.0, 3.0}, {1.0, 2.0, 2.0}}};
constexpr double kResidualWork[2][2] = {{4.0, 6.0}, {4.0, 6.0}};
constexpr double kActivationWork[2][kActivations][2] = {};

}  // namespace fastnorm
