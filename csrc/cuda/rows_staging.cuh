// Rows in shared memory: how a team copies a piece there, and where a step's pack lies.
#pragma once

#include "rows.cuh"

namespace fastnorm::cuda {

// The places of a staged piece's packs. Packs lie as they are walked, without the gaps between runs. Single elements
// lie as far past a multiple of 16 bytes as in global memory.
template <int W>
class Slots {
 public:
  template <class T>
  FASTNORM_DEVICE Slots(const RowsPiece<W>& piece, const T* tensor)
      : shape_(piece.shape),
        first_(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(tensor) / sizeof(T)) +
               static_cast<uint32_t>(piece.base)),
        lanes_(16 / sizeof(T)) {}

  FASTNORM_DEVICE int operator()(const Step& step) const {
    if constexpr (W == 8) return step.index;
    if constexpr (W > 1) return step.run * (shape_.piece_length - shape_.length) + step.index;
    return step.run * shape_.run_slots + shift(step.run) + step.pack;
  }
  FASTNORM_DEVICE int shift(int run) const {
    return static_cast<int>((first_ + static_cast<uint32_t>(run) * shape_.run_offset) % lanes_);
  }

 private:
  const RowsShape& shape_;
  uint32_t first_, lanes_;
};

// Begins to copy runs of single elements to shared memory, in aligned blocks of 16 bytes except at the ends of a run.
// The threads that read the elements are not those that copy them.
template <class T>
FASTNORM_DEVICE void stage_runs(const RowsPiece<1>& piece, const Team& team, const T* tensor, Pack<T, 1>* staged) {
  constexpr int kLanes = 16 / sizeof(T);
  const RowsShape& shape = piece.shape;
  const Slots<1> slots(piece, tensor);
  const T* const from_base = tensor + piece.base;
  const int blocks = shape.run_slots / kLanes, packs = piece.span.packs;
  for (int step = team.lane; step < piece.span.runs * blocks; step += team.width) {
    const int run = static_cast<int>(shape.by_blocks.divide(static_cast<uint32_t>(step)));
    const int begin = (step - run * blocks) * kLanes - slots.shift(run);
    const T* from = from_base + static_cast<int64_t>(static_cast<uint32_t>(run) * shape.run_offset) + begin;
    Pack<T, 1>* to = staged + step * kLanes;
    if (begin >= 0 && begin + kLanes <= packs) {
      stage<kLanes>(reinterpret_cast<Pack<T, kLanes>*>(to), from);
    } else {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        if (begin + lane >= 0 && begin + lane < packs) stage<1>(to + lane, from + lane);
      }
    }
  }
}

// A tensor and its place in shared memory.
template <class T, int W>
struct StagedTensor {
  const T* tensor;
  Pack<T, W>* staged;
};

// Begins to copy a team's piece of some tensors to shared memory, in kCopyGroups groups (nothing where it is not
// `valid`). Every thread copies what it reads itself on a walk over the same group. Single elements are all in the
// first group. Tensors after the second may be null.
template <class T, int W, int kTensors>
FASTNORM_DEVICE void stage_rows(const RowsPiece<W>& piece, const Team& team, bool valid,
                                const StagedTensor<T, W> (&tensors)[kTensors]) {
  int groups = 0;
  if constexpr (W == 1) {
#pragma unroll
    for (int i = 0; i < kTensors; ++i) {
      if (valid && (i < 2 || tensors[i].tensor != nullptr))
        stage_runs(piece, team, tensors[i].tensor, tensors[i].staged);
    }
  } else if (valid) {
    const Slots<W> slots(piece, tensors[0].tensor);
    const T* from[kTensors];  // where the piece begins: computed once, not at every step
#pragma unroll
    for (int i = 0; i < kTensors; ++i) {
      from[i] = i < 2 || tensors[i].tensor != nullptr ? tensors[i].tensor + piece.base : nullptr;
      keep_in_register(from[i]);
    }
    piece.for_copy_groups(team, true, [&](const ThreadSteps& range, int) {
      piece.for_steps(range, [&](const Step& step) {
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
          if (i < 2 || tensors[i].tensor != nullptr) {
            stage<W>(tensors[i].staged + slots(step), from[i] + static_cast<int64_t>(step.offset) * W);
          }
        }
      });
      commit_copies();
      ++groups;
    });
  }
  for (; groups < kCopyGroups; ++groups) commit_copies();
}

// Calls body(range) for one copy group of a team's piece after the other; ready(copy_group) waits until the group has
// landed.
template <int W, class Ready, class Body>
FASTNORM_DEVICE void for_landed(const RowsPiece<W>& piece, const Team& team, bool valid, Ready ready, Body body) {
  if constexpr (W == 1) {
    ready(kCopyGroups - 1);
    team.sync();  // other threads copied it
    body(piece.whole(team, valid));
  } else {
    piece.for_copy_groups(team, valid, [&](const ThreadSteps& range, int group) {
      ready(group);
      body(range);
    });
  }
}
// Call before another piece is copied over this one.
template <int W>
FASTNORM_DEVICE void release_staged(const Team& team) {
  if constexpr (W == 1) team.sync();  // other threads copy over what this one has read
}
// Begins to bring a team's piece of `tensor` into L2, where later reads find it.
template <int W, class T>
FASTNORM_DEVICE void prefetch_rows(const RowsPiece<W>& piece, const Team& team, const T* tensor) {
  piece.for_steps(piece.whole(team, true), [&](const Step& step) {
    // One element of every 16 bytes brings the others with it.
    const bool brings = W > 1 || step.pack % (16 / static_cast<int>(sizeof(T))) == 0;
    if (brings) prefetch_l2(piece.at(tensor, step));
  });
}

}  // namespace fastnorm::cuda
