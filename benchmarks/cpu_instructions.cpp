// Counts the instructions of one call of the CPU kernels, for benchmarks/count_cpu_instructions.py:
//
//   cpu_instructions CAPABILITY KIND N C S GROUPS LAYOUT DTYPE ACTIVATION RESIDUAL PASS
//
// KIND: batch, group, layer. LAYOUT: planar, last. ACTIVATION: a number of core/activation.h. PASS: forward, backward,
// eval. A child makes the call, and this process takes it instruction by instruction, which works for whatever the
// processor runs. Exit status: 3 where the processor does not run CAPABILITY, 4 where no process may be traced.
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/api.h"

using namespace fastnorm;

namespace {

constexpr int kOtherProcessor = 3, kNotPermitted = 4;

struct Job {
  Geometry g;
  DType dtype;
  Activation activation;
  bool residual;
  std::string pass;
};

// Numbers between -2 and 2 without a pattern.
std::vector<char> make_tensor(int64_t n, DType dtype, uint32_t seed) {
  std::vector<char> bytes(n * size_of(dtype) + 128);
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525 + 1013904223;
    const float value = static_cast<float>(static_cast<int32_t>(seed)) * 0x1p-30f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::kFloat32) {
      std::memcpy(bytes.data() + i * 4, &value, 4);
    } else {
      std::memcpy(bytes.data() + i * 2, &half, 2);
    }
  }
  return bytes;
}

void run_tasks(int64_t tasks, cpu::Order /*order*/, void (*body)(void*, int64_t), void* context) {
  for (int64_t t = 0; t < tasks; ++t) body(context, t);
}

class Call {
 public:
  Call(const cpu::Kernels& kernels, const Job& job) : kernels_(kernels), job_(job) {
    const CpuInfo machine{int64_t(1) << 20, int64_t(32) << 20, 1};
    const cpu::Parallel parallel{1, run_tasks};
    const bool masked = job.residual && is_two_sided(job.activation), eval = job.pass == "eval";
    const Params weight{weight_.data(), DType::kFloat32}, bias{bias_.data(), DType::kFloat32}, none{};
    const void* residual = job.residual ? residual_.data() : nullptr;
    ForwardArgs forward{job.g,
                        job.dtype,
                        x_.data(),
                        residual,
                        y_.data(),
                        masked && !eval ? mask_.data() : nullptr,
                        weight,
                        bias,
                        eval ? bias : none,
                        eval ? weight : none,
                        stats_.data(),
                        false,
                        {},
                        1e-5,
                        job.activation,
                        0};
    BackwardArgs backward{job.g,
                          job.dtype,
                          dy_.data(),
                          x_.data(),
                          masked ? nullptr : residual,
                          masked ? mask_.data() : nullptr,
                          weight,
                          bias,
                          stats_.data(),
                          false,
                          nullptr,
                          nullptr,
                          job.activation,
                          0,
                          dx_.data(),
                          job.residual ? dresidual_.data() : nullptr,
                          {},
                          {}};
    forward_ = {forward, plan_cpu(job.g, job.dtype, 1, 1, machine), parallel};
    backward_ = {backward, plan_cpu(job.g, job.dtype, 2, 1 + job.residual, machine), parallel, dparams_.data(),
                 dparams_.data() + job.g.C};
  }
  void forward() const { kernels_.forward(forward_); }
  void run() const { job_.pass == "backward" ? kernels_.backward(backward_) : kernels_.forward(forward_); }

 private:
  const cpu::Kernels& kernels_;
  const Job job_;
  const int64_t numel_ = job_.g.numel();
  std::vector<char> x_ = make_tensor(numel_, job_.dtype, 1), dy_ = make_tensor(numel_, job_.dtype, 2);
  std::vector<char> residual_ = make_tensor(numel_, job_.dtype, 3);
  std::vector<char> y_ = x_, dx_ = x_, dresidual_ = x_;
  std::vector<uint8_t> mask_ = std::vector<uint8_t>(mask_bytes(job_.g, job_.dtype) + 8);
  std::vector<float> weight_ = std::vector<float>(job_.g.C, 1.0f), bias_ = std::vector<float>(job_.g.C, 0.25f);
  std::vector<float> stats_ = std::vector<float>(kStatsRows * job_.g.sets());
  std::vector<double> dparams_ = std::vector<double>(2 * job_.g.C);
  cpu::ForwardCall forward_;
  cpu::BackwardCall backward_;
};

[[noreturn]] void stop(int status, const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::exit(status);
}

// The instructions that a child executes between two signals that it sends itself, of which raise takes some.
template <class F>
long count(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kNotPermitted);
    raise(SIGSTOP);
    f();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSTOPPED(status)) stop(kNotPermitted, "this system lets no process be traced");
  for (long steps = 0;; ++steps) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) stop(kNotPermitted, "single steps are not permitted");
    waitpid(child, &status, 0);
    if (!WIFSTOPPED(status)) stop(1, "the call ended its process");
    if (WSTOPSIG(status) == SIGTRAP) continue;
    const bool done = WSTOPSIG(status) == SIGSTOP;
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    if (!done) stop(1, "the call received a signal");
    return steps;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 12) stop(2, "usage: CAPABILITY KIND N C S GROUPS LAYOUT DTYPE ACTIVATION RESIDUAL PASS");
  const std::string capability = argv[1], kind = argv[2], dtype = argv[8];
  const auto at = [&](int i) { return std::strtoll(argv[i], nullptr, 10); };
  const Kind kinds[] = {Kind::kBatch, Kind::kGroup, Kind::kLayer};
  const auto* found = std::find_if(kinds, kinds + 3, [&](Kind k) { return kind == name_of(k); });
  if (found == kinds + 3 || (dtype != "float32" && dtype != "bfloat16")) stop(2, "unknown kind or dtype");
  const Geometry g{*found, at(3), at(4), at(5), *found == Kind::kBatch ? at(4) : at(6), argv[7] == std::string("last")};
  const Job job{g, dtype == "float32" ? DType::kFloat32 : DType::kBFloat16, static_cast<Activation>(at(9)), at(10) != 0,
                argv[11]};
  for (const cpu::Kernels* kernels : cpu::available_kernels()) {
    if (capability != kernels->name) continue;
    const Call call(*kernels, job);
    call.forward();  // statistics and mask for backward; and all that happens once
    std::printf("%ld\n", count([&] { call.run(); }));
    return 0;
  }
  stop(kOtherProcessor, "this processor, or this build, has no such instructions");
}
