// Layer norm over the channels of planar maps: the walk of columns.cuh with the words exchanged. A sample's positions
// lie side by side and are the columns; its channels lie one below the other and are the rows.
//
//                positions ->
//   channel 0   [ lane 0 ][ lane 1 ] ... [ lane threads_x - 1 ]   a pack of positions each
//   channel 1   [        ][        ]                              taken by the next threads_x threads
//   ...         all channels, threads_y at a time, several under way
//
// A block takes a tile of positions with all their channels, so that its sets are whole. Statistics belong to the
// lanes, weight and bias to the rows. As many rows as fit stay in shared memory from the first read of x to the last;
// those beyond are read twice, the second time from L2.
#pragma once

#include "columns_reduce.cuh"
#include "gang.cuh"

namespace fastnorm::cuda {

// The positions are the channels of columns, a set each, and the channels are the positions.
inline ColumnsShape positions_shape(const Geometry& g, const Grid& grid, DType dtype) {
  return columns_shape({Kind::kGroup, g.N, g.S, g.C, g.S, true}, grid, dtype);
}

// The statistics of a thread's positions. xhat = (x - mean) * rstd + shift, which takes in what rounding cut off the
// mean.
template <class A, int W>
struct PositionStats {
  A mean[W], rstd[W], shift[W];

  FASTNORM_DEVICE void set(int w, const SetStats<A>& s) {
    mean[w] = s.mean, rstd[w] = s.rstd, shift[w] = -s.low * s.rstd;
  }
};

// A row's weight and bias.
template <class A>
struct RowParams {
  A weight, bias;
};
template <class T, class A = Accum<T>>
FASTNORM_DEVICE RowParams<A> load_row_params(const Params& weight, const Params& bias, int row) {
  return {load_param_of<T>(weight, row, A(1)), load_param_of<T>(bias, row, A(0))};
}

// The coefficients of a row's elements, as element.cuh takes them.
template <class A, int W>
struct RowOfPositions {
  const PositionStats<A, W>& stats;
  const RowParams<A>& params;

  FASTNORM_DEVICE Affine<A> operator[](int w) const {
    return {stats.mean[w], stats.rstd[w], stats.rstd[w] * params.weight,
            std::fma(stats.shift[w], params.weight, params.bias)};
  }
};

}  // namespace fastnorm::cuda
