#pragma once

#include <Python.h>

namespace fastnorm::ops {

// The operator `norm` for Python's eager calls. op: its Python object, torch.ops.fastnorm.norm.default._op.
PyObject* make_eager_norm(PyObject* op);

}  // namespace fastnorm::ops
