// Rows in registers: the walk of the kernels whose teams keep whole rows, so many elements in each thread.
//
//   row       pack 0 1 2 ... width-1 | width ... 2 width - 1 | ...    a set, whose weight changes with every element
//   thread    lane                   | lane + width          | ...    a few packs of 16 bytes
//   block     team 0, team 1, ...                                     a row each; blocks take rows in strides
//
// A team is a part of a warp, a warp, or several warps. A thread has the same channels in every row, so that it keeps
// their weights in shared memory, and in backward the sums of their gradients in registers.
//
// The packs come through a ring in shared memory, which holds the next rows while a team works on one. A thread copies
// what it reads itself, so that the ring needs no barrier.
#pragma once

#include "element.cuh"

namespace fastnorm::cuda {

// A geometry and its grid as these kernels need them.
struct RegisterRowsShape {
  int64_t rows;
  int length, packs;  // of a row: elements, packs
  int team, teams;    // threads; of a block
  int stages, ring_bytes;
  int64_t mask_row_bytes;
  // The largest power of two with which a sum of a row's elements is no larger than the largest of them, and that times
  // the length.
  float scale, scaled_length;
  float inverse_length, inverse_scaled;
};

inline RegisterRowsShape register_rows_shape(const Geometry& g, const Grid& grid, DType dtype) {
  RegisterRowsShape s{};
  s.rows = g.sets();
  s.length = static_cast<int>(g.set_size());
  s.packs = static_cast<int>(grid.piece_length);
  s.team = grid.threads_x;
  s.teams = grid.threads_y;
  s.stages = grid.stages;
  s.ring_bytes = static_cast<int>(grid.team_bytes) * grid.threads_y;
  s.mask_row_bytes = mask_row_bytes(g.mask_run(), dtype);
  const float length = static_cast<float>(s.length);
  for (s.scale = 1; s.scale * length > 1;) s.scale /= 2;
  s.scaled_length = s.scale * length;
  s.inverse_length = 1 / length;
  s.inverse_scaled = 1 / s.scaled_length;
  return s;
}

// The compiler does not widen or compute these again where they are used.
template <int W, class A>
FASTNORM_DEVICE void keep_in_registers(A (&values)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) keep_in_register(values[w]);
}

// A thread's numbers, pack by pack.
template <class Team>
struct RowNumbers {
  typename Team::A pack[Team::kPacks][Team::W];
};

// The sum of a * b over a pack.
template <int W, class A>
FASTNORM_DEVICE A product_sum(const A (&a)[W], const A (&b)[W]) {
  A sums[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) sums[w] = a[w] * b[w];
#pragma unroll
  for (int w = 4; w < W; ++w) sums[w % 4] = std::fma(a[w], b[w], sums[w % 4]);
  return tree_sum(sums);
}

// A thread's place in its block and its team's way through the rows. kFull: the rows fill all packs of the team.
template <class Element, int kElements, bool kFull>
class RowTeam {
 public:
  using T = Element;
  using A = Accum<T>;
  static constexpr int W = 16 / sizeof(T), kPacks = kElements / W;

  // scratch: kRegisterLadderBytes of shared memory.
  FASTNORM_DEVICE RowTeam(const RegisterRowsShape& shape, void* scratch)
      : width(shape.team),
        lane(thread_index() % width),
        index(thread_index() / width),
        first_row(block_index() * shape.teams + index),
        row_step(static_cast<int>(grid_blocks()) * shape.teams),
        rows(rows_from(first_row, shape.rows)),
        block_rows(rows_from(block_index() * shape.teams, shape.rows)),
        scratch_(static_cast<A*>(scratch)),
        count_((shape.packs - lane + width - 1) / width) {}

  const int width, lane, index;
  const int64_t first_row;
  const int row_step;          // the team takes rows first_row, first_row + row_step, ...
  const int rows, block_rows;  // so many; so many the first team of the block, which has most

  FASTNORM_DEVICE int64_t row(int i) const { return first_row + int64_t(i) * row_step; }
  // Whether the thread has pack k. The planner sees to it that it has the first half of them.
  FASTNORM_DEVICE bool has(int k) const { return kFull || 2 * k < kPacks || k < count_; }
  // The element of a row that pack k begins with.
  FASTNORM_DEVICE unsigned element(int k) const { return static_cast<unsigned>(lane + k * width) * W; }

  // The sums of `numbers` over the team, the same bits in all of its threads. All threads of the block take part. One
  // barrier suffices, because consecutive calls have places of their own (parity): whoever writes a place has passed
  // the barrier of the call between, and so have those who read it.
  template <int kNumbers>
  FASTNORM_DEVICE void sum(A (&numbers)[kNumbers], int parity) const {
    if (width < kWarp) {
      for (int lanes = 1; lanes < width; lanes *= 2) add_lanes(numbers, lanes);
      return;
    }
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) add_lanes(numbers, lanes);
    if (width == kWarp) return;
    constexpr int kMostWarps = kResidentThreads / kWarp;
    A* const sums = scratch_ + parity * kMostWarps * 2;
    const int warp = thread_index() / kWarp, other = thread_index() % kMostWarps, warps = width / kWarp;
    if (thread_index() % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) sums[warp * kNumbers + i] = numbers[i];
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      numbers[i] = other < warps ? sums[(index * warps + other) * kNumbers + i] : A(0);
    }
#pragma unroll
    for (int lanes = 1; lanes < kMostWarps; lanes *= 2) add_lanes(numbers, lanes);
  }

 private:
  template <int kNumbers>
  FASTNORM_DEVICE static void add_lanes(A (&numbers)[kNumbers], int lanes) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] += shuffle_xor(numbers[i], lanes);
  }
  // The planner sees to it that the number fits 32 bits.
  FASTNORM_DEVICE int rows_from(int64_t first, int64_t rows) const {
    return first >= rows ? 0 : static_cast<int>((rows - first + row_step - 1) / row_step);
  }

  A* const scratch_;
  const int count_;
};

// Calls body(team) with the team of this thread. Smooth activations have one body for all rows, because it is long.
template <class T, int kElements, bool kSmooth, class Body>
FASTNORM_DEVICE void with_row_team(const RegisterRowsShape& shape, void* scratch, Body body) {
  if constexpr (!kSmooth) {
    if (shape.packs * static_cast<int>(16 / sizeof(T)) == shape.team * kElements) {
      return body(RowTeam<T, kElements, true>(shape, scratch));
    }
  }
  body(RowTeam<T, kElements, false>(shape, scratch));
}

// Memory for kEach packs of V of every thread: those of a warp lie together, so that their addresses differ by
// constants.
template <class V>
FASTNORM_DEVICE V* own_place(void* memory, int each) {
  return static_cast<V*>(memory) + thread_index() / kWarp * kWarp * each + thread_index() % kWarp;
}

// The parameters of a thread's channels in shared memory, as A.
template <class Team>
class SharedNumbers {
 public:
  using T = typename Team::T;
  using A = typename Team::A;
  static constexpr int W = Team::W, kPacks = Team::kPacks, kLanes = 16 / sizeof(A);
  static constexpr int kBytes = kPacks * W * static_cast<int>(sizeof(A));  // of a thread

  FASTNORM_DEVICE SharedNumbers(const Team& team, const Params& params, A absent, void* memory)
      : own_(own_place<Pack<A, kLanes>>(memory, kPacks * W / kLanes)) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!team.has(k)) continue;
      A numbers[W];
      load_params<T>(params, team.element(k), absent, numbers);
#pragma unroll
      for (int w = 0; w < W; w += kLanes) {
        A some[kLanes];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) some[i] = numbers[w + i];
        write_whole_shared(own_ + (k * W + w) / kLanes * kWarp, narrow<A>(some));
      }
    }
  }
  FASTNORM_DEVICE void read(int k, A (&numbers)[W]) const {
#pragma unroll
    for (int w = 0; w < W; w += kLanes) {
      A some[kLanes];
      widen<A>(read_whole(own_ + (k * W + w) / kLanes * kWarp), some);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) numbers[w + i] = some[i];
    }
  }

 private:
  Pack<A, kLanes>* const own_;
};

// The rows of some tensors on their way: one or two (stages) of them in shared memory.
template <class Team>
class RowRing {
 public:
  using T = typename Team::T;
  static constexpr int W = Team::W, kPacks = Team::kPacks;

  FASTNORM_DEVICE RowRing(const RegisterRowsShape& shape, void* memory, int tensors)
      : place_(own_place<Pack<T, W>>(memory, shape.stages * tensors * kPacks)),
        two_(shape.stages == 2),
        step_(tensors * kPacks * kWarp) {}

  // Begins to copy this thread's packs of a row of one tensor to the stage that take() reads next. `row`: where the row
  // begins.
  FASTNORM_DEVICE void load(const Team& team, int tensor, const T* row) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (team.has(k)) stage<W>(place_ + (tensor * kPacks + k) * kWarp, row + team.element(k));
    }
  }
  // Ends the copies of a row, and goes on to the next stage.
  FASTNORM_DEVICE void advance() {
    commit_copies();
    if (two_) place_ += at_second_ ? -step_ : step_;
    at_second_ = !at_second_;
  }
  // Waits for the oldest row.
  FASTNORM_DEVICE void wait() const {
    if (two_) {
      wait_copies(1);
    } else {
      wait_copies(0);
    }
  }
  FASTNORM_DEVICE Pack<T, W> take(int tensor, int k) const {
    return read_whole(place_ + (tensor * kPacks + k) * kWarp);
  }

 private:
  Pack<T, W>* place_;
  const bool two_;
  const int step_;
  bool at_second_ = false;
};

}  // namespace fastnorm::cuda
