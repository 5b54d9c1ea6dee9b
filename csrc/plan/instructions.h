// Machine instructions that the kernels execute for an element of x. `make count-instructions ARGS=--update`
// makes this file, of benchmarks/results/instructions.json. Every pair is for half types and for float32.
#pragma once

// clang-format off
#include "core/activation.h"

namespace fastnorm {

// A fused launch that keeps x in registers, or in shared memory; the pass of split that takes sums; the pass
// that writes. 0 where there is no such kernel. `piece`: what each thread of a fused launch executes for a
// piece, beside its elements.
struct ElementWork {
  double registers, shared, reduce, apply, piece;
};

// [forward, backward][rows, rows whose weights change with every element, columns], packs of 16 bytes, no
// activation.
constexpr ElementWork kElementWork[2][3][2] = {
    {{{0.0, 17.5, 7.2, 8.4, 818.2}, {0.0, 35.4, 10.8, 12.1, 811.8}},
     {{14.6, 27.9, 20.2, 8.4, 0.0}, {17.3, 52.2, 29.6, 12.1, 0.0}},
     {{0.0, 15.5, 7.1, 5.1, 1204.0}, {0.0, 18.5, 8.4, 4.9, 993.2}}},
    {{{0.0, 23.2, 14.8, 9.6, 658.4}, {0.0, 36.1, 16.7, 14.4, 654.2}},
     {{23.9, 49.0, 41.7, 9.6, 0.0}, {24.4, 62.4, 63.7, 14.4, 0.0}},
     {{0.0, 18.9, 9.1, 7.0, 1064.6}, {0.0, 20.0, 4.0, 9.1, 909.1}}},
};

// Times so much with narrower packs: [forward, backward], of 8 bytes in rows, single elements in rows and in
// columns.
constexpr double kNarrowPacks[2][2][3] = {
    {{1.90, 5.73, 3.02}, {3.14, 3.14, 2.17}},
    {{1.60, 5.61, 3.45}, {3.95, 3.95, 2.64}},
};

// More with a residual: [forward, backward].
constexpr double kResidualWork[2][2] = {{10.0, 18.8}, {2.3, 3.5}};

// More with an activation: [forward, backward][Activation].
constexpr double kActivationWork[2][kActivations][2] = {
    {
        {0.0, 0.0},  // none
        {1.0, 1.9},  // relu
        {3.2, 4.0},  // leaky_relu
        {5.3, 23.6},  // silu
        {19.3, 31.9},  // gelu
        {18.7, 26.3},  // gelu_tanh
        {7.5, 7.2},  // hardswish
        {4.3, 20.2},  // sigmoid
        {11.7, 18.6},  // tanh
    },
    {
        {0.0, 0.0},  // none
        {3.6, 2.8},  // relu
        {8.0, 8.1},  // leaky_relu
        {18.5, 48.8},  // silu
        {45.4, 97.5},  // gelu
        {52.7, 65.5},  // gelu_tanh
        {14.5, 14.5},  // hardswish
        {16.5, 46.8},  // sigmoid
        {30.7, 43.5},  // tanh
    },
};

}  // namespace fastnorm
