// All plans of a call, and the choice of the cheapest.
#include "cuda.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

#include "choices.h"
#include "cost.h"
#include "grid.h"

namespace fastnorm {

namespace {

// Chooses the cheaper exchange of a grid's gangs. Returns false where another is forced.
bool choose_exchange(Grid& grid, DType dtype, const DeviceInfo& device, const Forced& forced) {
  if (grid.gang == Gang::kGrid && grid.traversal == Traversal::kColumns) {
    Grid scattered = grid;
    scattered.exchange = Exchange::kScatter;
    const bool cheaper = exchange_us(scattered, dtype, device) < exchange_us(grid, dtype, device);
    if (forced.exchange < 0 ? cheaper : forced.exchange == static_cast<int>(Exchange::kScatter)) grid = scattered;
  }
  return allows(forced.exchange, static_cast<int>(grid.exchange));
}

// Whether the second stage has no wave to hold.
bool second_stage_idle(const Grid& grid) { return grid.stages == 2 && div_up(grid.items, grid.teams()) <= grid.blocks; }

// The part of a device that launches whose blocks wait for each other may use.
DeviceInfo without_free_sms(DeviceInfo device, int free_sms) {
  device.num_sms = std::max(1, device.num_sms - free_sms);
  device.cluster_sms = std::max(0, device.cluster_sms - free_sms);
  return device;
}

// Whether only fused plans will do, and whether others will.
bool only_fused(Forced f) {
  f.strategy = -1;
  return f != Forced{};
}
bool allows_fused(const Forced& f) { return allows(f.strategy, static_cast<int>(Strategy::kFused)); }
bool allows_split(const Forced& f) { return allows(f.strategy, static_cast<int>(Strategy::kSplit)) && !only_fused(f); }

// The number of partials that a fold merges: [outer, pieces, columns].
int64_t partials(const Geometry& g, const Grid& grid) {
  if (grid.traversal == Traversal::kColumns) return g.outer() * grid.pieces * g.C;
  return g.sets() * grid.pieces;
}

// The workspace of a grid's gangs: their partials, and a counter each where they sync alone.
int64_t gang_bytes(const Grid& grid, DType dtype) {
  const int64_t counters = grid.syncs_by_gang() ? grid.blocks / grid.pieces : 0;
  return grid.partials_bytes(dtype) + counters * int64_t(sizeof(unsigned));
}

// A call's tensors as a fused launch walks them.
struct View {
  Geometry geometry;
  int pack;
};

// Samples as rows, where runs have no whole packs of 16 bytes and samples do. The kernels have no masks for it: those
// have a row for each run.
std::optional<View> view_samples_as_rows(const Geometry& g, DType dtype, int alignment, bool mask) {
  const auto is_wide = [&](int pack) { return pack * size_of(dtype) == 16; };
  const bool in_32_bits = g.C <= std::numeric_limits<int32_t>::max() / g.S;
  if (!is_planar_batch(g) || g.N == 1 || mask || !in_32_bits) return std::nullopt;
  if (is_wide(pack_width(g, dtype, alignment))) return std::nullopt;
  const Geometry rows = samples_as_rows(g);
  const int pack = pack_width(rows, dtype, alignment);
  return is_wide(pack) ? std::optional(View{rows, pack}) : std::nullopt;
}

// The elements that lie side by side in a row of columns.
int64_t row_length(const Geometry& g) { return g.sets_are_positions() ? g.S : g.C; }

// The inputs of planning a call, forward or backward.
template <class Needs>
struct Planner {
  const Geometry& g;
  const DType dtype;
  const Needs& needs;
  const DeviceInfo& device;
  const PlanOptions& options;
  const int pack = pack_width(g, dtype, needs.alignment);
  const View own{g, pack};
  const DeviceInfo sync_device =
      without_free_sms(device, options.free_sms);  // for launches whose blocks wait for each other

  // mask: forward writes one, or backward reads it.
  std::vector<View> views(bool mask) const {
    std::vector<View> all;
    const auto add = [&](const View& view) {
      if (allows(options.forced.traversal, static_cast<int>(view.geometry.traversal()))) all.push_back(view);
    };
    add(own);
    if (const auto rows = view_samples_as_rows(g, dtype, needs.alignment, mask)) add(*rows);
    return all;
  }

  // Calls make(grid, co-resident blocks, whether it syncs) for all fused launches that fit. grid_sync: the grid syncs
  // at the end, where the device has such a launch. in_registers: whether blocks can keep the sets in registers, and
  // enough of them are on the device.
  template <class Make>
  void for_each_fused(const View& view, const Staging& staging, bool persistent, bool grid_sync, bool& in_registers,
                      Make make) const {
    const Forced& forced = options.forced;
    for (FusedChoice choice : fused_choices(view.geometry, dtype, staging, persistent, sync_device, forced)) {
      const bool cooperates = choice.gang == Gang::kCluster ? device.cooperative_clusters : device.cooperative;
      const bool syncs = grid_sync && cooperates;
      choice.persistent = choice.persistent || syncs;
      const DeviceInfo& where = syncs || choice.gang == Gang::kGrid ? sync_device : device;
      // Then they do not keep them in shared memory: they would move as many bytes with several times the instructions.
      if (in_registers && choice.gang == Gang::kBlock && choice.place == Place::kShared) continue;
      Grid grid;
      if (!fused_grid(view.geometry, dtype, view.pack, staging, choice, where, grid)) continue;
      if (!choose_exchange(grid, dtype, device, forced)) continue;
      if (second_stage_idle(grid) && forced.stages != 2) continue;
      // Runs can lead to cluster sizes that are no powers of two, which might fill a device badly.
      if (grid.gang == Gang::kCluster && grid.pieces != choice.pieces && forced.pieces < 0) continue;
      const int64_t resident = co_resident_blocks(grid, where);
      if (choice.place == Place::kRegisters && resident * grid.threads() >= int64_t(where.num_sms) * kBlockThreads) {
        in_registers = true;
      }
      make(grid, resident, syncs);
    }
  }
};

// ---- forward ----

struct ForwardPlanner : Planner<ForwardNeeds> {
  Streams streams_of(const View& view) const {
    return {1, needs.output + needs.residual, dtype, view.geometry.numel(), row_length(view.geometry)};
  }
  ElementWork work_of(const View& view) const {
    return element_work(false, view.geometry, view.pack, dtype, needs.activation, needs.residual);
  }

  ForwardPlan separate(Strategy strategy) const {
    ForwardPlan plan{strategy, split_grid(g, dtype, pack, device), 0, 1, {}};
    const ElementWork work = work_of(own);
    const Streams streams = streams_of(own);
    const bool splits = strategy == Strategy::kSplit;
    if (splits) {
      const int64_t all = partials(g, plan.grid);
      plan.workspace_bytes = all * moments_size(dtype);
      plan.launches = needs.output ? 3 : 2;
      plan.estimate = estimate_pass(plan.grid, streams, streams.read, false, work.reduce, device) +
                      estimate_fold(g.sets(), all / g.sets(), device);
    }
    if (needs.output || !splits) {
      plan.estimate =
          plan.estimate + estimate_pass(plan.grid, streams, streams.read + streams.applied, splits, work.apply, device);
    }
    plan.estimate = plan.estimate + estimate_launches(plan.launches, false);
    return plan;
  }

  void add_fused(const View& view, std::vector<ForwardPlan>& plans) const {
    const bool columns = view.geometry.traversal() == Traversal::kColumns;
    const Staging staging{1, false, false, true, columns};
    const Streams streams = streams_of(view);
    const ElementWork work = work_of(view);
    bool in_registers = false;
    for_each_fused(view, staging, false, false, in_registers, [&](const Grid& grid, int64_t resident, bool) {
      const Estimate estimate =
          estimate_fused(grid, streams, work, resident, device) + estimate_launches(1, grid.gang == Gang::kGrid);
      plans.push_back({Strategy::kFused, grid, gang_bytes(grid, dtype), 1, estimate});
    });
  }

  std::vector<ForwardPlan> all() const {
    if (needs.frozen) return {separate(Strategy::kApply)};
    std::vector<ForwardPlan> plans;
    if (allows_fused(options.forced)) {
      for (const View& view : views(needs.residual && is_two_sided(needs.activation))) add_fused(view, plans);
    }
    if (allows_split(options.forced) && !g.sets_are_positions()) plans.push_back(separate(Strategy::kSplit));
    return plans;
  }
};

// ---- backward ----

// The geometry in which every cell is a set of its own, where a cell is a run or more.
Geometry cells_of(const Geometry& g) {
  Geometry cells = g;
  if (g.cells_are_runs()) cells.G = g.C;
  return cells;
}

struct BackwardPlanner : Planner<BackwardNeeds> {
  const int64_t pair = 2 * accum_size(dtype);

  Streams streams_of(const View& view) const {
    return {needs.residual ? 3 : 2, needs.input + needs.dresidual, dtype, view.geometry.numel(),
            row_length(view.geometry)};
  }
  ElementWork work_of(const View& view) const {
    return element_work(true, view.geometry, view.pack, dtype, needs.activation, needs.dresidual);
  }

  BackwardPlan empty(Strategy strategy, ParamSums sums, const View& view) const {
    const Grid none = empty_grid(view.geometry.traversal(), view.pack);
    return {strategy, sums, g, none, none, none, {}, false, 0, 0, 0, 0, 0, {}};
  }

  // The gradients of parameters that change with every element, down the rows.
  void add_params(BackwardPlan& plan) const {
    if (plan.param_sums != ParamSums::kOwnLaunch) return;
    // Rows kernels exist for packs of 8 bytes of the half types, columns kernels do not.
    plan.params = split_columns(1, g.N, g.C, dtype, pack * size_of(dtype) == 16 ? pack : 1, device);
    plan.params_bytes = plan.params.pieces * g.C * pair;
  }

  Estimate params_pass(const Grid& grid, double instructions, bool again) const {
    const Streams streams{streams_of(own).read, 0, dtype, g.numel(), g.C};
    return estimate_pass(grid, streams, streams.read, again, instructions, device);
  }
  // Where nothing goes on beside it.
  Estimate params_fold(const BackwardPlan& plan) const {
    return estimate_fold_params(g.C, (plan.sums_bytes + plan.params_bytes) / (g.C * pair), device);
  }

  void add_fused(const View& view, ParamSums sums, bool& in_registers, std::vector<BackwardPlan>& plans) const {
    const bool in_gang = sums == ParamSums::kInGang, own_launch = sums == ParamSums::kOwnLaunch;
    // The fused sums of a batch norm are final, and the kernel writes them as the gradients.
    const bool folds = in_gang || (sums == ParamSums::kFromCells && g.kind != Kind::kBatch);
    // Smooth activations would need more registers than there are.
    const bool rereads = view.geometry.traversal() == Traversal::kColumns && !is_smooth(needs.activation);
    const Streams streams = streams_of(view);
    const ElementWork work = work_of(view);
    const Staging staging{streams.read, true, in_gang, !own_launch, rereads};
    for_each_fused(view, staging, in_gang, folds, in_registers,
                   [&](const Grid& grid, int64_t resident, bool grid_sync) {
                     BackwardPlan plan = empty(Strategy::kFused, sums, view);
                     plan.reduce = grid;
                     plan.grid_sync = grid_sync;
                     if (has_units(view.geometry, grid)) plan.units = choose_units(grid);
                     if (folds && !in_gang) plan.sums_bytes = g.outer() * run_pieces(g, grid) * g.C * pair;
                     if (in_gang) plan.params_bytes = grid.blocks / grid.pieces * g.C * pair;
                     add_params(plan);
                     plan.gang_bytes = gang_bytes(grid, dtype);
                     plan.launches = 1 + (own_launch ? 2 : 0) + (folds && !grid_sync);
                     plan.estimate = estimate_fused(grid, streams, work, resident, device) +
                                     estimate_partials(plan.sums_bytes + plan.params_bytes, device) +
                                     estimate_launches(plan.launches, grid_sync || grid.gang == Gang::kGrid);
                     if (grid_sync) plan.estimate = plan.estimate + estimate_grid_sync();
                     if (own_launch) plan.estimate = plan.estimate + params_pass(plan.params, work.reduce, false);
                     if (folds || own_launch) plan.estimate = plan.estimate + params_fold(plan);
                     plans.push_back(plan);
                   });
  }

  BackwardPlan split(ParamSums sums) const {
    BackwardPlan plan = empty(Strategy::kSplit, sums, own);
    const ElementWork work = work_of(own);
    const bool terms = needs.input && !needs.frozen, own_launch = sums == ParamSums::kOwnLaunch;
    if (terms || sums == ParamSums::kFromCells) {
      plan.cells = cells_of(g);
      plan.reduce = split_grid(plan.cells, dtype, pack, device, own_launch);
      plan.sums_bytes = partials(plan.cells, plan.reduce) * pair;
      ++plan.launches;
    }
    add_params(plan);
    if (own_launch && plan.launches == 0) ++plan.launches;  // else they are a part of the launch of reduce
    if (terms) plan.terms_bytes = g.sets() * pair, ++plan.launches;
    if (needs.input) plan.apply = split_grid(g, dtype, pack, device);
    ++plan.launches;  // apply, or the fold of the parameters
    const Streams streams = streams_of(own);
    const bool reduces = plan.reduce.items > 0;
    plan.estimate = estimate_launches(plan.launches, false) + estimate_partials(plan.workspace_bytes(), device);
    const auto add = [&](const Estimate& part) { plan.estimate = plan.estimate + part; };
    if (reduces) add(estimate_pass(plan.reduce, streams, streams.read, false, work.reduce, device));
    if (own_launch) add(params_pass(plan.params, reduces ? 0 : work.reduce, reduces));  // work.reduce is of both
    if (terms) add(estimate_fold(g.sets(), partials(plan.cells, plan.reduce) / g.sets(), device));
    if (needs.input) {
      // The fold of the parameters goes on beside it.
      const int moved = streams.read + streams.applied;
      add(estimate_pass(plan.apply, streams, moved, reduces || own_launch, work.apply, device));
    } else {
      add(params_fold(plan));
    }
    return plan;
  }

  BackwardPlan given() const {
    BackwardPlan plan = empty(Strategy::kApply, ParamSums::kNone, own);
    plan.apply = split_grid(g, dtype, pack, device);
    plan.launches = 1;
    const Streams streams = streams_of(own);
    const int moved = streams.read + streams.applied;
    plan.estimate =
        estimate_pass(plan.apply, streams, moved, false, work_of(own).apply, device) + estimate_launches(1, false);
    return plan;
  }

  std::vector<BackwardPlan> all() const {
    if (needs.frozen && !needs.params) return {given()};
    // Blocks can gather along the rows only where a channel has the same place in every row: with one group.
    const ParamSums sums = !needs.params            ? ParamSums::kNone
                           : g.sets_are_positions() ? ParamSums::kInGang
                           : g.per_element()        ? ParamSums::kOwnLaunch
                                                    : ParamSums::kFromCells;
    std::vector<BackwardPlan> plans;
    bool in_registers = false;
    if ((needs.input || g.sets_are_positions()) && allows_fused(options.forced)) {
      for (const View& view : views(needs.mask)) {
        if (sums == ParamSums::kOwnLaunch && g.G == 1) add_fused(view, ParamSums::kInGang, in_registers, plans);
        add_fused(view, sums, in_registers, plans);
      }
    }
    if (allows_split(options.forced) && !g.sets_are_positions()) plans.push_back(split(sums));
    return plans;
  }
};

// Of plans that take the same time, the one that uses less of the memory and the SMs is cheaper.
template <class Plan>
bool is_cheaper(const Plan& a, const Plan& b) {
  const auto key = [](const Estimate& e) { return std::pair(e.total(), e.memory + e.issue); };
  return key(a.estimate) < key(b.estimate);
}

// Of plans that cost the same, the first: plans with one block per set come first.
template <class Plan>
Plan cheapest(const std::vector<Plan>& plans) {
  if (plans.empty()) throw std::invalid_argument("no plan of this call is as forced");
  return *std::min_element(plans.begin(), plans.end(), is_cheaper<Plan>);
}

template <class Plan>
std::vector<Plan> compared(std::vector<Plan> plans) {
  std::stable_sort(plans.begin(), plans.end(), is_cheaper<Plan>);
  std::vector<Plan> different;
  for (const Plan& plan : plans) {
    if (std::find(different.begin(), different.end(), plan) == different.end()) different.push_back(plan);
  }
  return different;
}

}  // namespace

int pack_width(const Geometry& g, DType dtype, int alignment) {
  if (dtype == DType::kFloat64) return 1;
  const int64_t run = g.mask_run(), size = size_of(dtype);
  const bool of_positions = g.traversal() == Traversal::kRows || g.sets_are_positions();
  for (const int pack : {8, 4}) {
    // Packs of 8 bytes of a half type exist for runs of positions, for 14x14 maps. Numbers of channels are multiples of
    // 8 or odd.
    const bool instantiated = pack * size == 16 || (of_positions && pack * size == 8);
    if (instantiated && run % pack == 0 && pack * size <= alignment) return pack;
  }
  return 1;
}

ForwardPlan plan_forward(const Geometry& g, DType dtype, const ForwardNeeds& needs, const DeviceInfo& device,
                         const PlanOptions& options) {
  return cheapest(ForwardPlanner{{g, dtype, needs, device, options}}.all());
}
BackwardPlan plan_backward(const Geometry& g, DType dtype, const BackwardNeeds& needs, const DeviceInfo& device,
                           const PlanOptions& options) {
  return cheapest(BackwardPlanner{{g, dtype, needs, device, options}}.all());
}

std::vector<ForwardPlan> compare_forward(const Geometry& g, DType dtype, const ForwardNeeds& needs,
                                         const DeviceInfo& device, const PlanOptions& options) {
  return compared(ForwardPlanner{{g, dtype, needs, device, options}}.all());
}
std::vector<BackwardPlan> compare_backward(const Geometry& g, DType dtype, const BackwardNeeds& needs,
                                           const DeviceInfo& device, const PlanOptions& options) {
  return compared(BackwardPlanner{{g, dtype, needs, device, options}}.all());
}

}  // namespace fastnorm
