// What has to be done once for a kernel on a device, before its first launch there.
//
// CUDA keeps a kernel's limits (dynamic shared memory, cluster size) for a device, and all host threads share them. A
// limit set to what one launch needs would take away what another thread has just been given for a larger launch of the
// same kernel. So the first launch raises the limit to the most that the device has, and nothing lowers it again.
#pragma once

#include <mutex>
#include <set>
#include <utility>

namespace fastnorm::cuda {

class OncePerKernel {
 public:
  // Calls raise() unless it has succeeded for this kernel and device, and returns its error; 0 is success. A thread
  // that comes while another raises the limit waits for it. From the second launch on this takes a lock and calls no
  // one.
  template <class Raise>
  auto run(const void* kernel, int device, Raise raise) -> decltype(raise()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::pair<const void*, int> key(kernel, device);
    if (done_.count(key) != 0) return {};
    const auto error = raise();
    if (error == decltype(raise()){}) done_.insert(key);
    return error;
  }

 private:
  std::mutex mutex_;
  std::set<std::pair<const void*, int>> done_;
};

}  // namespace fastnorm::cuda
