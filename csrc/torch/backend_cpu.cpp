// The CPU backend: torch's threads, the sizes of the caches.
#include <ATen/Parallel.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "backend.h"
#include "core/formulas.h"
#include "cpu/api.h"
#include "cpu_memory.h"
#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

// The tasks of a parallel region: a stretch of them for each worker, in equal shares as torch's own loops have. So a
// worker meets the data of the pass before, and of the layer before: where processors share no last cache, another's
// are three times as far. On a shared machine equal shares finish at unequal times, so who is done helps the others.
class Region {
 public:
  Region(int64_t tasks, int64_t workers, cpu::Order order, void (*body)(void*, int64_t), void* context)
      : tasks_(tasks), stretches_(workers), order_(order), body_(body), context_(context) {}

  void work(int64_t worker) {
    const int64_t workers = stretches_.size();
    for (int64_t i = 0; i < workers; ++i) work_on((worker + i) % workers);
  }

 private:
  struct Stretch {
    std::atomic<int64_t> taken{0};
    char apart[64 - sizeof(taken)];  // no two counters in a cache line
  };

  void work_on(int64_t stretch) {
    const int64_t workers = stretches_.size();
    const int64_t begin = tasks_ * stretch / workers, end = tasks_ * (stretch + 1) / workers;
    for (int64_t t; (t = stretches_[stretch].taken.fetch_add(1, std::memory_order_relaxed)) < end - begin;) {
      body_(context_, order_ == cpu::Order::kForwards ? begin + t : end - 1 - t);
    }
  }

  const int64_t tasks_;
  std::vector<Stretch> stretches_;
  const cpu::Order order_;
  void (*const body_)(void*, int64_t);
  void* const context_;
};

void run_tasks(int64_t tasks, cpu::Order order, void (*body)(void*, int64_t), void* context) {
  const int64_t workers = std::min<int64_t>(tasks, at::get_num_threads());
  Region region(tasks, workers, order, body, context);
  const auto work = [](int64_t begin, int64_t end, void* region) {
    for (; begin < end; ++begin) static_cast<Region*>(region)->work(begin);
  };
  // torch's own loop, out of line: this library links no second OpenMP runtime.
  TORCH_CHECK(torch_parallel_for(0, workers, 1, work, &region) == 0, "fastnorm: a parallel task failed");
}

cpu::Parallel parallel_for(int64_t elements) {
  return {elements < kMinParallelElements ? 1 : at::get_num_threads(), run_tasks};
}

// The size of cache index of the first processor, as Linux tells it; `otherwise` where it does not. (sysconf gave 384
// MiB for an L3 of 32 on a virtual machine: it multiplies by the host's sockets.)
int64_t cache_bytes(int index, int64_t otherwise) {
  const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size";
  long size = 0;
  char unit = ' ';
  if (std::FILE* file = std::fopen(path.c_str(), "r")) {
    if (std::fscanf(file, "%ld%c", &size, &unit) < 1) size = 0;
    std::fclose(file);
  }
  if (size <= 0) return otherwise;
  return static_cast<int64_t>(size) << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
}

CpuInfo cpu_info(int threads) {
  // FASTNORM_CACHE_BYTES="l2,l3": for tests and tuning.
  static const CpuInfo caches = [] {
    CpuInfo info{cache_bytes(2, int64_t(512) << 10), cache_bytes(3, int64_t(16) << 20), 1};
    long l2 = 0, l3 = 0;
    const char* given = std::getenv("FASTNORM_CACHE_BYTES");
    if (given != nullptr && std::sscanf(given, "%ld,%ld", &l2, &l3) == 2 && l2 > 0 && l3 > 0) {
      info.l2_bytes = l2;
      info.l3_bytes = l3;
    }
    return info;
  }();
  return {caches.l2_bytes, caches.l3_bytes, threads};
}

// Moves a running statistic by row[sample * C + c], a statistic of every set.
template <class A>
void move_running(const ParamGrads& running, int64_t stride, const A* row, const RunningArgs& args, double momentum,
                  double factor) {
  const int64_t C = args.channels, samples = args.sets / C;
  dispatch_scalar(running.dtype, [&](auto zero) {
    using R = decltype(zero);
    R* out = static_cast<R*>(running.data);
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n) sum += row[n * C + c];
      R& r = out[c * stride];
      r = static_cast<R>(blend(static_cast<double>(r), sum / static_cast<double>(samples) * factor, momentum));
    }
  });
}

void update_running_stats(const RunningArgs& args, at::Device) {
  double batches = 0;
  if (args.num_batches_tracked) batches = static_cast<double>(++*args.num_batches_tracked);
  const double count = args.given_count ? *args.given_count : static_cast<double>(args.count);
  if (count == 0 || args.channels == 0) return;
  const double factor = args.given_count ? unbiased(count) : args.unbiased;
  const double momentum = args.cumulative ? 1 / batches : args.momentum;
  dispatch(args.dtype, [&](auto tag) {
    using A = Accum<typename decltype(tag)::type>;
    const A* stats = static_cast<const A*>(args.stats);
    if (args.running_mean.data) move_running(args.running_mean, args.mean_stride, stats, args, momentum, 1);
    if (args.running_var.data && has_variance(args, count)) {
      move_running(args.running_var, args.var_stride, stats + kVar * args.sets, args, momentum, factor);
    }
  });
}

void fold_partials(const FoldArgs& args, at::Device) {
  dispatch(args.dtype, [&](auto tag) {
    using A = Accum<typename decltype(tag)::type>;
    const int64_t C = args.channels, size = partial_size(C);
    A* const stats = static_cast<A*>(args.stats);
    double count = 0;
    for (int64_t r = 0; r < args.ranks; ++r) count += static_cast<const A*>(args.partials)[r * size + 3 * C];
    *args.count = count;
    for (int64_t c = 0; c < C; ++c) {
      Welford<double> total{};
      for (int64_t r = 0; r < args.ranks; ++r) {
        const A* const partial = static_cast<const A*>(args.partials) + r * size;
        total.merge(welford_of_partial([&](int64_t i) { return partial[i]; }, C, c));
      }
      const FoldedStats<A> folded(total, args.eps);
      stats[kMean * C + c] = folded.mean;
      stats[kRstd * C + c] = folded.rstd;
      stats[kVar * C + c] = folded.var;
      stats[kMeanLow * C + c] = folded.mean_low;
    }
  });
}

void forward(const ForwardArgs& args, at::Device device) {
  const cpu::Parallel parallel = parallel_for(args.geometry.numel());
  cpu::kernels().forward({args, plan_cpu(args.geometry, args.dtype, 1, 1, cpu_info(parallel.threads)), parallel});
  if (args.running.moves()) update_running_stats(args.running, device);
}

void round_sums(const double* sums, int64_t n, const ParamGrads& grads) {
  dispatch_scalar(grads.dtype, [&](auto zero) {
    using P = decltype(zero);
    P* out = static_cast<P*>(grads.data);
    for (int64_t c = 0; c < n; ++c) {
      if constexpr (std::is_same_v<P, double>) {
        out[c] = sums[c];
      } else {
        out[c] = static_cast<P>(static_cast<float>(sums[c]));
      }
    }
  });
}

void backward(const BackwardArgs& args, at::Device) {
  const int64_t C = args.geometry.C;
  const bool weight = args.dweight.data != nullptr, bias = args.dbias.data != nullptr;
  std::vector<double> sums(weight || bias ? 2 * C : 0, 0.0);
  double *dweight = weight ? sums.data() : nullptr, *dbias = bias ? sums.data() + C : nullptr;
  const cpu::Parallel parallel = parallel_for(args.geometry.numel());
  const int outputs = (args.dx != nullptr) + (args.dresidual != nullptr);
  const CpuPlan plan = plan_cpu(args.geometry, args.dtype, 2, outputs, cpu_info(parallel.threads));
  cpu::kernels().backward({args, plan, parallel, dweight, dbias});
  if (weight) round_sums(dweight, C, args.dweight);
  if (bias) round_sums(dbias, C, args.dbias);
}

void normalize_images(const ImageArgs& args, at::Device) {
  cpu::kernels().normalize_images({args, parallel_for(args.numel())});
}

}  // namespace

const Backend kCpuBackend{make_empty_cpu, forward, backward, fold_partials, update_running_stats, normalize_images};

}  // namespace fastnorm::ops
