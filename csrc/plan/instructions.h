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

// [forward, backward][rows, rows whose weights change with every element, columns, positions], packs of 16
// bytes, no activation.
constexpr ElementWork kElementWork[2][4][2] = {
    {{{0.0, 14.7, 6.2, 7.4, 806.5}, {0.0, 23.8, 8.7, 11.1, 813.3}},
     {{13.8, 25.4, 18.5, 7.4, 0.0}, {16.3, 40.2, 25.4, 11.1, 0.0}},
     {{0.0, 13.9, 6.3, 4.9, 990.0}, {0.0, 17.6, 7.6, 4.6, 834.3}},
     {{0.0, 19.6, 9.8, 7.8, 680.3}, {0.0, 23.2, 11.6, 8.4, 527.3}}},
    {{{0.0, 19.3, 11.1, 8.0, 617.4}, {0.0, 29.0, 11.7, 12.6, 616.2}},
     {{22.4, 42.0, 36.6, 8.0, 0.0}, {23.1, 52.8, 57.8, 12.6, 0.0}},
     {{0.0, 16.7, 8.4, 5.6, 812.9}, {0.0, 18.1, 4.0, 7.8, 758.9}},
     {{0.0, 35.4, 17.7, 14.2, 635.8}, {0.0, 48.6, 24.3, 17.2, 560.3}}},
};

// Times so much with narrower packs: [forward, backward], of 8 bytes in rows, single elements in rows and in
// columns; of 8 bytes and single elements of positions.
constexpr double kNarrowPacks[2][2][5] = {
    {{1.78, 5.72, 3.03, 1.56, 5.31}, {3.98, 3.98, 2.09, 3.63, 3.63}},
    {{1.56, 6.41, 4.07, 1.77, 6.87}, {4.68, 4.68, 3.01, 3.90, 3.90}},
};

// More with a residual: [forward, backward].
constexpr double kResidualWork[2][2] = {{9.8, 22.1}, {5.0, 8.8}};

// More with an activation: [forward, backward][Activation].
constexpr double kActivationWork[2][kActivations][2] = {
    {
        {0.0, 0.0},  // none
        {1.0, 1.0},  // relu
        {3.0, 2.5},  // leaky_relu
        {5.7, 21.5},  // silu
        {13.2, 24.4},  // gelu
        {18.6, 24.1},  // gelu_tanh
        {6.9, 6.0},  // hardswish
        {4.7, 18.5},  // sigmoid
        {11.6, 16.5},  // tanh
    },
    {
        {0.0, 0.0},  // none
        {3.1, 2.5},  // relu
        {7.0, 7.7},  // leaky_relu
        {18.5, 47.5},  // silu
        {31.6, 84.5},  // gelu
        {51.7, 63.3},  // gelu_tanh
        {12.5, 13.1},  // hardswish
        {16.5, 45.5},  // sigmoid
        {29.7, 41.3},  // tanh
    },
};

}  // namespace fastnorm
