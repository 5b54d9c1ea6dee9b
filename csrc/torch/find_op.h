#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace fastnorm::ops {

// An operator of ours, called through the dispatcher: modes and other devices see it.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace fastnorm::ops
