// The elements that a norm reduces over, from sizes and layout alone. Every input is seen as (N, C, S):
//
//   set   the elements that share statistics
//   cell  set ∩ channel: the elements that share statistics and weight
//   run   contiguous elements of one cell (planar) or of one position (channels last)
//
//   norm, layout      sets   elements of a set
//   batch, planar     C      N runs of S, C*S apart
//   batch, last       C      N*S positions, C apart
//   group, planar     N*G    D*S contiguous: D cells of S
//   group, last       N*G    S positions of D channels, C apart
//   layer             N      C contiguous (group with G = 1, S = 1)
//   layer of a map    N*S    C elements, S apart: the channels of a position, planar (channels last: N*S rows of C)
//   instance                 group with G = C
#pragma once

#include <cstdint>
#include <string>

#include "fields.h"

namespace fastnorm {

enum class Kind : int { kBatch = 0, kGroup = 1, kLayer = 2 };
constexpr const char* name_of(Kind kind) {
  return kind == Kind::kBatch ? "batch" : kind == Kind::kGroup ? "group" : "layer";
}

// How the kernels walk. Rows: a team takes a set and walks its runs. Columns: a block takes a tile of neighbouring
// channels (where sets are positions, of neighbouring positions) and keeps one accumulator per lane.
enum class Traversal : int { kRows = 0, kColumns = 1 };

struct Geometry {
  Kind kind;
  int64_t N, C, S;
  int64_t G;  // groups per sample; C for batch norm, whose sets are channels
  bool channels_last;

  int64_t D() const { return C / G; }
  int64_t numel() const { return N * C * S; }
  // Layer norm over the channels of planar maps: neighbouring sets lie side by side, and a row of one channel's
  // elements belongs to S sets.
  bool sets_are_positions() const { return kind == Kind::kLayer && S > 1; }
  int64_t sets() const { return kind == Kind::kBatch ? C : sets_are_positions() ? N * S : N * G; }
  int64_t set_size() const { return kind == Kind::kBatch ? N * S : sets_are_positions() ? C : D() * S; }

  // There is one value per channel and sample, so that the weight changes with every element of a run.
  bool per_element() const { return kind != Kind::kBatch && S == 1; }
  Traversal traversal() const {
    if (kind == Kind::kBatch) return channels_last || S == 1 ? Traversal::kColumns : Traversal::kRows;
    return (channels_last && S > 1) || sets_are_positions() ? Traversal::kColumns : Traversal::kRows;
  }

  // A set has several cells and each is a run: planar groups.
  bool cells_are_runs() const { return kind == Kind::kGroup && traversal() == Traversal::kRows && !per_element(); }

  // The number of elements in a row of the mask. They lie side by side and have side-by-side weights or one weight.
  int64_t mask_run() const {
    if (sets_are_positions()) return S;
    return traversal() == Traversal::kColumns ? C : per_element() ? D() : S;
  }

  // Columns: `outer` independent stacks of `positions` rows of C channels.
  int64_t outer() const { return kind == Kind::kBatch ? 1 : N; }
  int64_t positions() const { return kind == Kind::kBatch ? N * S : S; }
  // Channels of one set at one position.
  int64_t set_channels() const { return kind == Kind::kBatch ? 1 : D(); }

  bool operator==(const Geometry&) const = default;
};
FASTNORM_FIELDS(Geometry, kind, N, C, S, G, channels_last)

// Planar batch norm whose samples are seen as rows of C * S columns: the S columns of a channel are a set, as the
// channels of a group are. Packs of columns go on from channel to channel, so that they divide the rows even of 7x7
// maps.
inline bool is_planar_batch(const Geometry& g) { return g.kind == Kind::kBatch && g.traversal() == Traversal::kRows; }
inline Geometry samples_as_rows(const Geometry& g) { return {Kind::kGroup, 1, g.C * g.S, g.N, g.C, true}; }

// The runs of one set or of one cell: `count` runs of `length` contiguous elements, `stride` apart.
struct Runs {
  int64_t count, length, stride;
};

// The runs that statistics are taken over (rows only).
inline Runs stat_runs(const Geometry& g) {
  if (g.kind == Kind::kBatch) return {g.N, g.S, g.C * g.S};
  return {1, g.D() * g.S, 0};
}

// The same elements, split so that a run has one weight: a cell of a group is a run. (Not where per_element.)
inline Runs weight_runs(const Geometry& g) {
  if (g.kind == Kind::kBatch || g.per_element()) return stat_runs(g);
  return {g.D(), g.S, g.S};
}

// The runs that a team walks (rows only).
inline Runs rows_runs(const Geometry& g) { return g.per_element() ? stat_runs(g) : weight_runs(g); }

// The first element of a set (rows only).
inline int64_t set_base(const Geometry& g, int64_t set) {
  return g.kind == Kind::kBatch ? set * g.S : set * g.D() * g.S;
}

// The channel of a set's first element.
inline int64_t first_channel(const Geometry& g, int64_t set) {
  return g.kind == Kind::kBatch ? set : set % g.G * g.D();
}

std::string to_string(const Geometry& geometry);

}  // namespace fastnorm
