// The operator `norm` as an eager call of Python's makes it: plain tensors and numbers go to the dispatcher as they
// are. torch parses the arguments of any operator by its schema, which takes 2 us of the 6 of a tiny call; for whatever
// else (another tensor class, a torch function mode, a number of another type) torch's way is taken.
#include "eager_norm.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "find_op.h"
#include "ops.h"

namespace fastnorm::ops {

namespace {

// Takes the arguments one by one; none is plain any more once one was not.
class PlainArguments {
 public:
  PlainArguments(PyObject* const* values, Py_ssize_t count)
      : next_(values), are_plain_(count == kCount && !at::impl::torch_function_mode_enabled()) {}

  bool are_plain() const { return are_plain_; }

  OptTensor tensor() {
    PyObject* value = take();
    if (value == nullptr || value == Py_None) return {};
    if (THPVariable_CheckExact(value)) return THPVariable_Unpack(value);
    are_plain_ = false;
    return {};
  }
  int64_t integer() {
    PyObject* value = take_if([](PyObject* v) { return PyLong_CheckExact(v); });
    return value ? checked(PyLong_AsLongLong(value)) : 0;
  }
  double number() {
    PyObject* value = take_if([](PyObject* v) { return PyFloat_CheckExact(v) || PyLong_CheckExact(v); });
    return value ? checked(PyFloat_AsDouble(value)) : 0;
  }
  std::optional<double> number_or_none() {
    if (are_plain_ && *next_ == Py_None) return ++next_, std::nullopt;
    return number();
  }
  bool boolean() {
    return take_if([](PyObject* v) { return PyBool_Check(v); }) == Py_True;
  }

 private:
  static constexpr Py_ssize_t kCount = 14;

  PyObject* take() { return are_plain_ ? *next_++ : nullptr; }
  template <class Is>
  PyObject* take_if(Is is) {
    PyObject* value = take();
    are_plain_ = value && is(value);
    return are_plain_ ? value : nullptr;
  }
  template <class Number>
  Number checked(Number value) {
    if (value == Number(-1) && PyErr_Occurred()) {  // too large
      PyErr_Clear();
      are_plain_ = false;
    }
    return value;
  }

  PyObject* const* next_;
  bool are_plain_;
};

PyObject* eager_norm(PyObject* op, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PlainArguments take(values, count);
  const OptTensor x = take.tensor(), weight = take.tensor(), bias = take.tensor(), residual = take.tensor(),
                  running_mean = take.tensor(), running_var = take.tensor(), batches = take.tensor();
  const int64_t groups = take.integer(), normalized_dims = take.integer();
  const double eps = take.number();
  const int64_t activation = take.integer();
  const double activation_param = take.number();
  const bool use_input_stats = take.boolean();
  const std::optional<double> momentum = take.number_or_none();
  if (!take.are_plain() || !x) return PyObject_Vectorcall(op, values, count, nullptr);
  static const auto norm = find_op<NormSignature>("fastnorm::norm");
  Tensor y = [&] {
    const pybind11::gil_scoped_release no_gil;
    return norm.call(*x, weight, bias, residual, running_mean, running_var, batches, groups, normalized_dims, eps,
                     activation, activation_param, use_input_stats, momentum);
  }();
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyObject* make_eager_norm(PyObject* op) {
  static PyMethodDef definition{"norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&eager_norm)),
                                METH_FASTCALL, "torch.ops.fastnorm.norm"};
  return PyCFunction_New(&definition, op);
}

}  // namespace fastnorm::ops
