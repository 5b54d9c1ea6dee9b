// One of aten's operators, answered by a kernel of ours where its switch is on, and else by torch's.
//
// Where: the dispatch key BackendSelect, which every call passes below autograd and above the devices. A kernel there
// overrides none, so that torch's remain, for all that is not served, by going on to the next key. (A kernel for the
// CPU key replaces torch's, which warns, and has nothing to go on to.)
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "aten_switches.h"
#include "tensor_args.h"

namespace fastnorm::ops {

constexpr c10::DispatchKeySet kBelow(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);

// Text as a template's argument.
template <size_t n>
struct Text {
  char text[n];
  constexpr Text(const char (&s)[n]) { std::copy_n(s, n, text); }
};

// Asks: whether the switch decides, or the kernel alone.
enum class Asks { kSwitch, kKernel };

template <AtenNorm norm, Text name, auto kernel, Text overload = "", Asks asks = Asks::kSwitch>
struct AtenOp;
template <AtenNorm norm, Text name, class R, class... A, R (*kernel)(A...), Text overload, Asks asks>
struct AtenOp<norm, name, kernel, overload, asks> {
  static R call(c10::DispatchKeySet keys, A... args) {
    const c10::DispatchKeySet below = keys & kBelow;
    const c10::DispatchKey key = below.highestPriorityTypeId();
    if (key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA) {
      AtenSwitch& calls = aten_switch(norm, key == c10::DispatchKey::CPU ? AtenDevice::kCpu : AtenDevice::kCuda);
      const bool is_on = calls.is_on();
      if (is_on || asks == Asks::kKernel) {
        try {
          R result = kernel(args...);
          calls.count_served();
          return result;
        } catch (const c10::NotImplementedError& refusal) {  // before anything is written
          if (is_on) calls.count_left(refusal.what_without_backtrace());
        }
      }
    }
    static const auto torchs = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow((std::string("aten::") + name.text).c_str(), overload.text)
                                   .template typed<R(A...)>();
    return torchs.redispatch(below, std::forward<A>(args)...);
  }

  explicit AtenOp(torch::Library& library) {
    const std::string suffix = *overload.text ? std::string(".") + overload.text : "";
    library.impl((name.text + suffix).c_str(), TORCH_FN(call));
  }
};

// Each adds its operators.
void add_aten_norms(torch::Library& library);  // aten_norms.cpp
void add_aten_sync(torch::Library& library);   // aten_sync.cpp

}  // namespace fastnorm::ops
