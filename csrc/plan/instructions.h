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
    {{{0.0, 14.0, 6.2, 7.4, 889.0}, {0.0, 22.9, 8.7, 11.1, 896.6}},
     {{13.9, 25.2, 19.9, 7.4, 0.0}, {16.6, 40.3, 26.9, 11.1, 0.0}},
     {{0.0, 13.6, 6.3, 4.8, 1001.0}, {0.0, 17.6, 7.6, 4.7, 844.9}},
     {{0.0, 18.8, 9.4, 7.8, 724.3}, {0.0, 23.0, 11.5, 8.3, 573.7}}},
    {{{0.0, 18.8, 10.8, 7.8, 709.1}, {0.0, 27.5, 11.7, 12.6, 703.4}},
     {{22.8, 43.8, 37.2, 7.8, 0.0}, {22.9, 52.2, 58.9, 12.6, 0.0}},
     {{0.0, 18.0, 8.4, 5.6, 793.7}, {0.0, 20.6, 4.0, 7.8, 721.7}},
     {{0.0, 35.4, 17.7, 14.2, 635.8}, {0.0, 48.6, 24.3, 17.2, 560.3}}},
};

// Times so much with narrower packs: [forward, backward], of 8 bytes in rows, single elements in rows and in
// columns; of 8 bytes and single elements of positions.
constexpr double kNarrowPacks[2][2][5] = {
    {{1.84, 6.13, 3.11, 1.61, 5.19}, {4.13, 4.13, 2.15, 3.43, 3.43}},
    {{1.53, 6.60, 4.48, 1.77, 6.87}, {4.88, 4.88, 3.27, 3.90, 3.90}},
};

// More with a residual: [forward, backward].
constexpr double kResidualWork[2][2] = {{7.2, 14.8}, {8.8, 8.8}};

// More with an activation: [forward, backward][Activation].
constexpr double kActivationWork[2][kActivations][2] = {
    {
        {0.0, 0.0},  // none
        {1.0, 1.0},  // relu
        {3.0, 2.5},  // leaky_relu
        {5.9, 15.8},  // silu
        {13.3, 24.4},  // gelu
        {18.7, 24.1},  // gelu_tanh
        {6.9, 6.0},  // hardswish
        {4.9, 14.8},  // sigmoid
        {11.7, 16.5},  // tanh
    },
    {
        {0.0, 0.0},  // none
        {3.3, 2.6},  // relu
        {7.0, 7.3},  // leaky_relu
        {17.2, 37.1},  // silu
        {28.8, 82.0},  // gelu
        {50.4, 60.7},  // gelu_tanh
        {11.2, 10.6},  // hardswish
        {15.2, 35.1},  // sigmoid
        {28.4, 37.5},  // tanh
    },
};

}  // namespace fastnorm
