#include "choices.h"

#include <algorithm>
#include <limits>

namespace fastnorm {

namespace {

// Sectors are 32 bytes and come in pairs, so narrower tiles would read bytes that they do not use. Wider tiles leave
// fewer of them to spread over the SMs.
constexpr int64_t kTileBytes[] = {64, 128, 256};

// Layer norm over the channels of planar maps, where a tile of few positions has room for more channels. A row of the
// widest is a warp's.
constexpr int64_t kPositionsTileBytes[] = {32, 64, 128, 256, 512};

// Several blocks per SM wait in turn; one block alone has all of its shared memory. They divide the registers, of which
// kernels have enough for kResidentThreads.
constexpr int kBlocksPerSm[] = {4, 2, 1};

// The number of gang sizes that are tried for a grid, from the smallest that may hold a set. Some sizes leave fewer
// blocks idle in the last wave. Where more than the set is staged, or runs are not cut, the smallest do not hold it.
constexpr int kGridPieces = 8;

// As many positions of a piece in shared memory as fit.
constexpr int64_t kMostPositions = std::numeric_limits<int64_t>::max();

template <class List>
std::vector<int64_t> options_of(int forced, const List& list) {
  if (forced >= 0) return {forced};
  return {std::begin(list), std::end(list)};
}

// The tiles to try: narrow ones, and one of all channels, whose positions adjoin in memory.
std::vector<int64_t> tile_bytes_of(const Geometry& g, DType dtype, const Forced& forced) {
  auto tiles = options_of(forced.tile_bytes, kTileBytes);
  const int64_t whole = g.C * size_of(dtype);
  const int64_t most = kResidentThreads * 16;  // a pack of every thread of a block
  if (forced.tile_bytes < 0 && whole > tiles.back() && whole <= most) tiles.push_back(whole);
  return tiles;
}

// The sizes to try for gangs that divide a grid among them: as few blocks as hold a set, in as many waves as that
// takes, and larger ones.
std::vector<int64_t> grid_pieces(const StagedSets& sets, const FusedChoice& choice, int streams,
                                 const DeviceInfo& device) {
  const int64_t blocks = choice.blocks_per_sm * int64_t(device.num_sms);
  const int64_t limit = std::max<int64_t>(1, shared_limit(choice.blocks_per_sm, device));
  const int64_t least = std::max<int64_t>(2, div_up(sets.bytes * streams * choice.stages, limit));
  std::vector<int64_t> pieces;
  int64_t each = least;
  for (int tried = 0; tried < kGridPieces && each <= blocks; ++tried, ++each) {
    const int64_t gangs = std::min(sets.count, blocks / each);
    each = blocks / div_up(sets.count, div_up(sets.count, gangs));  // the fewest gangs that take as many waves
    pieces.push_back(each);
  }
  return pieces;
}

// Tiles have whole sets, so that gangs have nothing to share. Blocks take tiles in strides, and gather the sums of the
// channels on the way.
std::vector<FusedChoice> positions_choices(const Forced& forced) {
  std::vector<FusedChoice> choices;
  if (!allows(forced.gang, static_cast<int>(Gang::kBlock))) return choices;
  if (!allows(forced.place, static_cast<int>(Place::kShared))) return choices;
  for (const int64_t tile : options_of(forced.tile_bytes, kPositionsTileBytes)) {
    for (const int64_t blocks_per_sm : options_of(forced.blocks_per_sm, kBlocksPerSm)) {
      for (const int stages : {1, 2}) {
        if (!allows(forced.stages, stages)) continue;
        choices.push_back({Gang::kBlock, 1, stages, static_cast<int>(blocks_per_sm), tile, Place::kShared,
                           std::max(0, forced.staged_length), true});
      }
    }
  }
  return choices;
}

}  // namespace

std::vector<FusedChoice> fused_choices(const Geometry& g, DType dtype, const Staging& staging, bool persistent,
                                       const DeviceInfo& device, const Forced& forced) {
  if (g.sets_are_positions()) return positions_choices(forced);
  std::vector<FusedChoice> choices;
  const bool columns = g.traversal() == Traversal::kColumns;
  const auto tiles = columns ? tile_bytes_of(g, dtype, forced) : std::vector<int64_t>{1};  // rows: none
  std::vector<int64_t> clusters;
  for (int64_t size = 2; size <= device.largest_cluster; size *= 2) clusters.push_back(size);
  const auto add = [&](FusedChoice choice, Gang gang, const std::vector<int64_t>& pieces) {
    if (!allows(forced.gang, static_cast<int>(gang))) return;
    if (!allows(forced.place, static_cast<int>(choice.place))) return;
    choice.gang = gang;
    choice.persistent = persistent || choice.stages == 2 || gang == Gang::kGrid || choice.place == Place::kRegisters;
    const bool free = forced.pieces < 0 || gang == Gang::kBlock;
    for (const int64_t each : free ? pieces : std::vector<int64_t>{forced.pieces}) {
      choice.pieces = each;
      choices.push_back(choice);
    }
  };
  for (const Place place : {Place::kRegisters, Place::kShared}) {
    if (place == Place::kRegisters && !staging.registers) continue;
    for (const int64_t tile : tiles) {
      for (const int64_t blocks_per_sm : options_of(forced.blocks_per_sm, kBlocksPerSm)) {
        for (const int stages : {1, 2}) {
          if (!allows(forced.stages, stages)) continue;
          FusedChoice choice{Gang::kBlock, 1, stages, static_cast<int>(blocks_per_sm), tile, place, 0, false};
          const StagedSets sets = staged_sets(g, dtype, tile);
          if (staging.rereads && device.cooperative && stages == 1) {
            const int64_t pieces = blocks_per_sm * int64_t(device.num_sms) / sets.count;
            choice.staged_length = forced.staged_length < 0 ? kMostPositions : forced.staged_length;
            // Of gangs of other sizes only where it is asked for: the one wave is their point.
            const bool wanted = forced.staged_length >= 0 || allows(forced.pieces, pieces);
            if (pieces > 1 && wanted) add(choice, Gang::kGrid, {pieces});
          }
          if (forced.staged_length >= 0) continue;
          choice.staged_length = 0;
          add(choice, Gang::kBlock, {1});
          if (place == Place::kRegisters) continue;
          add(choice, Gang::kCluster, clusters);
          // A second stage hides nothing of a grid's syncs, and leaves half as much for a wave.
          if (device.cooperative && (stages == 1 || forced.stages == 2)) {
            add(choice, Gang::kGrid, grid_pieces(sets, choice, staging.streams, device));
          }
        }
      }
    }
  }
  return choices;
}

}  // namespace fastnorm
