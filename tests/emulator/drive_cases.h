// The calls that drive_kernels makes: small geometries that between them take every strategy, traversal, storage type,
// width of access, kind of epilogue and gang.
#pragma once

#include <string>
#include <vector>

#include "cuda/api.h"
#include "plan/cuda.h"

namespace fastnorm::drive {

struct Case {
  Geometry geometry;  // kind, N, C, S, G, channels_last
  DType dtype;
  Activation activation = Activation::kNone;
  bool residual = false;
  bool mask = false;    // saved by forward, read by backward
  bool frozen = false;  // batch only
  DType params = DType::kFloat32;
  bool affine = true;
  int offset = 0;  // every tensor begins so many elements past a multiple of 16 bytes
  Forced forced{};
};

// Whether this variant has kernels of the type (drive_kernels_types.cpp).
bool has_kernels(DType dtype);

// Of a type that there are kernels of, if possible one of the same size; false where a forced plan is of the case's
// own.
inline bool compiled(Case& c) {
  if (has_kernels(c.dtype)) return true;
  const bool to_half = c.dtype == DType::kFloat16 && has_kernels(DType::kBFloat16);
  c.dtype = to_half ? DType::kBFloat16 : DType::kFloat32;
  if (c.params != DType::kFloat32) c.params = c.dtype;
  return to_half || c.forced == Forced{};
}

// Cases whose plans are the cheapest ones.
inline std::vector<Case> free_cases() {
  constexpr Kind kBatch = Kind::kBatch, kGroup = Kind::kGroup, kLayer = Kind::kLayer;
  constexpr DType kF32 = DType::kFloat32, kF64 = DType::kFloat64, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
  using enum Activation;
  return {
      // batch, planar
      {{kBatch, 3, 5, 49, 5, false}, kF32},
      {{kBatch, 4, 6, 64, 6, false}, kF32, kRelu, true, true},
      {{kBatch, 2, 3, 4096, 3, false}, kBF16, kRelu},
      {{kBatch, 6, 2, 3000, 2, false}, kF16, kSilu, true},
      {{kBatch, 2, 4, 512, 4, false}, kF32, kLeakyRelu, true, true, true},
      {{kBatch, 2, 4, 40, 4, false}, kBF16, kGelu, false, false, true, kBF16},
      {{kBatch, 3, 4, 24, 4, false}, kF64, kTanh, true, false, false, kF64},
      {{kBatch, 2, 3, 33, 3, false}, kF32, kHardswish, false, false, false, kF32, false},
      {{kBatch, 2, 3, 64, 3, false}, kF32, kRelu, true, true, false, kF32, true, 1},
      {{kBatch, 2, 3, 65, 3, false}, kF16, kSilu, true, false, true, kF32, false},
      // batch, channels last and two-dimensional
      {{kBatch, 2, 24, 36, 24, true}, kBF16, kRelu, true, true},
      {{kBatch, 4, 64, 900, 64, true}, kF32, kSigmoid},
      {{kBatch, 700, 40, 1, 40, false}, kF16, kNone, true},
      {{kBatch, 3, 7, 50, 7, true}, kF32, kLeakyRelu, true, true},
      {{kBatch, 3, 16, 50, 16, true}, kF32, kRelu, true, true, true},
      {{kBatch, 2, 16, 30, 16, true}, kBF16, kLeakyRelu, false, false, true, kF32, false},
      {{kBatch, 3, 8, 20, 8, true}, kF64, kNone, false, false, false, kF64},
      // group and instance, planar
      {{kGroup, 2, 12, 49, 4, false}, kF32, kSilu},
      {{kGroup, 2, 8, 64, 2, false}, kBF16, kSilu, false, false, false, kBF16},
      {{kGroup, 1, 8, 5000, 2, false}, kF32, kRelu, true, true},
      {{kGroup, 3, 6, 100, 6, false}, kF16},
      {{kGroup, 1, 4, 20000, 2, false}, kBF16, kGeluTanh, true},
      {{kGroup, 2, 6, 10, 3, false}, kF64, kGelu, true, false, false, kF64},
      // group, channels last
      {{kGroup, 2, 32, 49, 8, true}, kF32, kSilu},
      {{kGroup, 2, 64, 256, 8, true}, kBF16, kRelu, true, true},
      {{kGroup, 1, 64, 2500, 4, true}, kF32},
      {{kGroup, 2, 15, 30, 5, true}, kF16, kHardswish, true},
      // layer
      {{kLayer, 50, 64, 1, 1, false}, kF32, kGelu},
      {{kLayer, 9, 768, 1, 1, false}, kBF16, kNone, true, false, false, kBF16},
      {{kLayer, 300, 40, 1, 1, false}, kF32},
      {{kLayer, 2, 5003, 1, 1, false}, kF32, kSilu},
      {{kLayer, 4, 4096, 1, 1, false}, kF16, kRelu, true, true},
      {{kLayer, 6, 37, 1, 1, false}, kF64, kTanh, false, false, false, kF64},
      {{kLayer, 8, 96, 1, 1, false}, kBF16, kGelu, false, false, false, kF32, true, 2},
      // layer over the channels of planar maps
      {{kLayer, 3, 40, 64, 1, false}, kBF16, kRelu, true, true},
      {{kLayer, 2, 300, 20, 1, false}, kF16, kSilu, true, false, false, kF16},
      {{kLayer, 2, 13, 77, 1, false}, kF32, kLeakyRelu, true, true},
      {{kLayer, 5, 9, 2, 1, false}, kF32},
      {{kLayer, 2, 24, 30, 1, false}, kF64, kTanh, true, false, false, kF64},
      {{kLayer, 2, 12, 64, 1, false}, kF32, kGelu, false, false, false, kF32, true, 1},
      {{kLayer, 2, 35, 48, 1, false}, kBF16, kNone, false, false, false, kF32, false},
  };
}

// Every one of `cases` with every one of `gangs`.
inline std::vector<Case> forced(const std::vector<Case>& cases, const std::vector<Forced>& gangs) {
  std::vector<Case> all;
  for (Case c : cases) {
    for (const Forced& gang : gangs) {
      c.forced = gang;
      all.push_back(c);
    }
  }
  return all;
}
inline Forced forced_gang(Gang gang, int pieces, int stages) {
  Forced f;
  f.strategy = static_cast<int>(Strategy::kFused);
  f.gang = static_cast<int>(gang);
  f.pieces = pieces;
  f.stages = stages;
  return f;
}

// For the device `few`: rows in registers of every kind of team, several to a team; rows in the shared memory of a
// block.
inline std::vector<Case> row_cases() {
  constexpr Kind kLayer = Kind::kLayer;
  constexpr DType kF32 = DType::kFloat32, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
  using enum Activation;
  const std::vector<Case> cases = {
      {{kLayer, 300, 40, 1, 1, false}, kF32, kRelu, true, true},
      {{kLayer, 70, 512, 1, 1, false}, kBF16, kNone, false, false, false, kBF16},
      {{kLayer, 29, 768, 1, 1, false}, kF16, kGelu, true},
      {{kLayer, 13, 1040, 1, 1, false}, kF32, kLeakyRelu, false, true},
      {{kLayer, 11, 3072, 1, 1, false}, kBF16, kRelu, true, true},
  };
  std::vector<Forced> places(3);
  for (Forced& f : places) f.place = static_cast<int>(Place::kRegisters);
  places[0].stages = 1, places[1].stages = 2;
  places[2].place = static_cast<int>(Place::kShared), places[2].gang = static_cast<int>(Gang::kBlock);
  return forced(cases, places);
}

// For the device `few`: pieces of several runs and of a part of one, several waves, waves that are not full.
inline std::vector<Case> gang_cases() {
  constexpr Kind kBatch = Kind::kBatch, kGroup = Kind::kGroup, kLayer = Kind::kLayer;
  constexpr DType kF32 = DType::kFloat32, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
  using enum Activation;
  const std::vector<Case> cases = {
      // batch, planar
      {{kBatch, 5, 3, 64, 3, false}, kF32, kRelu, true, true},
      {{kBatch, 2, 11, 1000, 11, false}, kBF16, kSilu, true},
      {{kBatch, 3, 4, 49, 4, false}, kF16},
      {{kBatch, 4, 3, 196, 3, false}, kBF16, kLeakyRelu, true, true, true},
      // batch, channels last and two-dimensional
      {{kBatch, 6, 104, 10, 104, true}, kBF16, kRelu, true, true},
      {{kBatch, 110, 40, 1, 40, false}, kF32, kSigmoid},
      {{kBatch, 3, 7, 50, 7, true}, kF16, kLeakyRelu, true, true},
      // group, planar
      {{kGroup, 2, 12, 64, 4, false}, kF32, kSilu},
      {{kGroup, 1, 4, 1500, 2, false}, kBF16, kGeluTanh, true},
      {{kGroup, 3, 6, 100, 2, false}, kF16, kRelu, true, true},
      // group, channels last
      {{kGroup, 2, 32, 49, 8, true}, kF32, kSilu},
      {{kGroup, 2, 64, 60, 8, true}, kBF16, kRelu, true, true},
      {{kGroup, 2, 15, 30, 5, true}, kF16, kHardswish, true},
      // layer
      {{kLayer, 13, 768, 1, 1, false}, kF32, kGelu},
      {{kLayer, 9, 1024, 1, 1, false}, kF16, kRelu, true, true},
      {{kLayer, 5, 777, 1, 1, false}, kBF16, kNone, true, false, false, kBF16},
  };
  return forced(cases,
                {forced_gang(Gang::kCluster, 2, 1), forced_gang(Gang::kCluster, 3, 2), forced_gang(Gang::kGrid, -1, 1),
                 forced_gang(Gang::kGrid, -1, 2), forced_gang(Gang::kGrid, 3, 2), forced_gang(Gang::kBlock, -1, 2)});
}

// For the device `few`: channels last, exchanges of both kinds, pieces of which a part is read twice.
inline std::vector<Case> channel_cases() {
  constexpr Kind kBatch = Kind::kBatch, kGroup = Kind::kGroup;
  const std::vector<Case> cases = {
      {{kBatch, 401, 64, 1, 64, false}, DType::kBFloat16, Activation::kRelu, true, true},
      {{kBatch, 5, 24, 64, 24, true}, DType::kFloat32, Activation::kLeakyRelu, false, true},
      {{kGroup, 2, 32, 221, 8, true}, DType::kFloat16},
  };
  const auto choice = [](int pieces, int staged_length, Exchange exchange) {
    Forced f = forced_gang(Gang::kGrid, pieces, 1);
    f.staged_length = staged_length;
    f.exchange = static_cast<int>(exchange);
    return f;
  };
  return forced(
      cases, {choice(-1, -1, Exchange::kScatter), choice(2, 64, Exchange::kGather), choice(3, 64, Exchange::kScatter)});
}

// For the device `few`: layer norm over the channels of planar maps; blocks that take several tiles, of which all or a
// part is staged.
inline std::vector<Case> position_cases() {
  const std::vector<Case> cases = {
      {{Kind::kLayer, 9, 100, 40, 1, false}, DType::kBFloat16, Activation::kRelu, true, true},
      {{Kind::kLayer, 7, 70, 36, 1, false}, DType::kFloat16, Activation::kSilu, true},
      {{Kind::kLayer, 20, 50, 7, 1, false}, DType::kFloat32, Activation::kLeakyRelu, false, true},
  };
  const auto choice = [](int stages, int staged_length) {
    Forced f = forced_gang(Gang::kBlock, -1, stages);
    f.staged_length = staged_length;
    return f;
  };
  return forced(cases, {choice(1, -1), choice(2, -1), choice(1, 64), choice(2, 64)});
}

// For the device `few`: planar, the samples as rows of columns.
inline std::vector<Case> sample_cases() {
  const std::vector<Case> cases = {
      {{Kind::kBatch, 30, 16, 9, 16, false}, DType::kBFloat16, Activation::kRelu},
      {{Kind::kBatch, 9, 40, 3, 40, false}, DType::kFloat16, Activation::kSilu, true, false, false, DType::kFloat16},
      {{Kind::kBatch, 5, 8, 25, 8, false}, DType::kFloat32, Activation::kLeakyRelu},
  };
  std::vector<Case> all = forced(
      cases, {forced_gang(Gang::kBlock, -1, 1), forced_gang(Gang::kCluster, 3, 2), forced_gang(Gang::kGrid, 2, 1)});
  for (Case& c : all) c.forced.traversal = static_cast<int>(Traversal::kColumns);
  return all;
}

// For devices with the largest clusters that exist.
inline std::vector<Case> large_cluster_cases() {
  const std::vector<Case> cases = {
      {{Kind::kBatch, 2, 3, 2000, 3, false}, DType::kFloat32, Activation::kRelu, true, true},
      {{Kind::kBatch, 4, 32, 50, 32, true}, DType::kBFloat16},
      {{Kind::kGroup, 2, 6, 1000, 2, false}, DType::kFloat16, Activation::kSilu},
      {{Kind::kLayer, 5, 1536, 1, 1, false}, DType::kFloat32},
  };
  return forced(cases, {forced_gang(Gang::kCluster, 16, 1), forced_gang(Gang::kCluster, 5, 2)});
}

// For the device `wide`: pieces of three and a part of the rounds that a block copies at a time (kUnroll packs a
// thread), so that each of the four copy groups has one.
inline std::vector<Case> long_cases() {
  constexpr Kind kBatch = Kind::kBatch, kGroup = Kind::kGroup, kLayer = Kind::kLayer;
  constexpr DType kF32 = DType::kFloat32, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
  using enum Activation;
  const auto sets_of = [&](int64_t pieces, int64_t sets) -> std::vector<Case> {
    return {
        {{kBatch, 8 * pieces, sets, 1600, sets, false}, kF32, kRelu, true, true},
        {{kGroup, sets, 8 * pieces, 3200, 1, false}, kBF16, kSilu},
        {{kLayer, sets, 12800 * pieces, 1, 1, false}, kF32, kLeakyRelu},
        {{kBatch, 1, 16 * sets, 800 * pieces, 16 * sets, true}, kF32, kRelu},
        {{kGroup, 1, 32 * sets, 800 * pieces, 4 * sets, true}, kF16, kSilu},
        {{kBatch, 2, 16 * sets - 7, 200 * pieces, 16 * sets - 7, true}, kF32},
    };
  };
  std::vector<Case> all = forced(sets_of(1, 3), {forced_gang(Gang::kBlock, -1, 1), forced_gang(Gang::kBlock, -1, 2)});
  for (const Case& c : forced(sets_of(2, 2), {forced_gang(Gang::kCluster, 2, 1), forced_gang(Gang::kCluster, 2, 2),
                                              forced_gang(Gang::kGrid, 2, 1), forced_gang(Gang::kGrid, 2, 2)})) {
    all.push_back(c);
  }
  return all;
}

inline std::vector<Case> cases_of(const std::string& device) {
  if (device == "wide") return long_cases();
  std::vector<Case> all = device == "few" ? gang_cases() : free_cases();
  if (device == "few") {
    for (const Case& c : row_cases()) all.push_back(c);
    for (const Case& c : channel_cases()) all.push_back(c);
    for (const Case& c : sample_cases()) all.push_back(c);
    for (const Case& c : position_cases()) all.push_back(c);
  }
  if (device == "h200") {
    for (const Case& c : large_cluster_cases()) all.push_back(c);
  }
  return all;
}

}  // namespace fastnorm::drive
