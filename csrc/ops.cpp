// The ops' schemas, and the Python module: loading it registers the ops.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#include "fingerprint.h"
#include "plan.h"

// man to beyond: the element's grid, see Grid in csrc/elements.h. table: a codebook, in place of a grid. scale: a code of
// ScaleKind. of_scale: its numbers, see Numbers in csrc/numbers.h. dims, sizes: the blocks, see blocks_of in csrc/check.h.
#define SWALP_FORMAT                                                                                                    \
  "int man, int least, float lowest, float highest, bool subnormals, int beyond, float[] table, int scale, "            \
  "float[] of_scale, int[] dims, int[] sizes, "
// rounding: a code of csrc/round.h. key: one int64, read only by stochastic rounding.
#define SWALP_ROUNDING "int rounding, int random_bits, Tensor? key, "

// The forms ending in _ work in place and return nothing. _plan rounds nothing: it returns the address of a plan (plan.h) for
// such calls. Two forms are for the CPU alone:
// _update_ is an optimizer's step with its roundings. kernel, numbers: see cpu/updates.h. states: those of the first weight, then
// those of the next. roles: of the weight, the gradient and each state, what it adds to a weight's stream; -1 if it is not
// rounded. If there are masters, the step is theirs, and the weights become rounded copies of them. It returns whether it
// could: it takes dense float32 tensors, alike in strides, that share no memory. If not, or if the call is dry, nothing has
// changed.
// _code_plan is of codes, of a row-major float32 x. coding: the fields of Coding, the bias of a scale's exponent, and the dtype
// that holds the numbers: 0 to 2 for float32, float16 and bfloat16.
STABLE_TORCH_LIBRARY(swalp_fx, m) {
  m.def("quantize(Tensor x, " SWALP_FORMAT SWALP_ROUNDING "int stream) -> Tensor");
  m.def("quantize_(Tensor(a!) x, " SWALP_FORMAT SWALP_ROUNDING "int stream) -> ()");
  m.def("quantize_foreach_(Tensor(a!)[] xs, " SWALP_FORMAT SWALP_ROUNDING "int[] streams) -> ()");
  m.def("quantize_plan(Tensor x, " SWALP_FORMAT SWALP_ROUNDING "int stream) -> int");
  m.def("quantize_update_(int kernel, float[] numbers, Tensor(a!)[] weights, Tensor(b!)[] gradients, Tensor(c!)[] states, "
        "Tensor(d!)[] masters, " SWALP_FORMAT SWALP_ROUNDING "int[] streams, int[] roles, bool dry) -> bool");
  m.def("quantize_code_plan(Tensor x, " SWALP_FORMAT SWALP_ROUNDING "int[] coding) -> int");
}

// ---- plans and fingerprints, for Python -------------------------------------------------------------------------------

namespace {

using swalp_fx::AnyPlan;
using swalp_fx::CodePlan;
using swalp_fx::Plan;

constexpr auto kPlan = "swalp_fx.plan";

AnyPlan* plan_of(PyObject* capsule) { return static_cast<AnyPlan*>(PyCapsule_GetPointer(capsule, kPlan)); }

// own(address) -> a capsule that deletes the plan with itself.
PyObject* own(PyObject*, PyObject* address) {
  void* plan = PyLong_AsVoidPtr(address);
  if (PyErr_Occurred()) return nullptr;
  return PyCapsule_New(plan, kPlan, [](PyObject* capsule) { delete plan_of(capsule); });
}

template <class F>
bool without_gil(const F& f) {
  std::string failure;
  PyThreadState* state = PyEval_SaveThread();
  try {
    f();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  PyEval_RestoreThread(state);
  if (!failure.empty()) PyErr_SetString(PyExc_RuntimeError, failure.c_str());
  return failure.empty();
}

// round(plan, from, to, key, stream): from, to and key are addresses of memory; key points to an int64, or is 0.
PyObject* round(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "round takes 5 arguments");
  const Plan* plan = static_cast<Plan*>(plan_of(arguments[0]));
  void* memory[3];
  for (int i = 0; i < 3; ++i) memory[i] = PyLong_AsVoidPtr(arguments[1 + i]);
  const auto stream = static_cast<uint64_t>(PyLong_AsUnsignedLongLongMask(arguments[4]));
  if (PyErr_Occurred()) return nullptr;
  const uint64_t key = memory[2] == nullptr ? 0 : *static_cast<const uint64_t*>(memory[2]);
  if (!without_gil([&] { plan->round(memory[0], memory[1], key, stream); })) return nullptr;
  Py_RETURN_NONE;
}

// keeps(plan, from) -> bool
PyObject* keeps(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "keeps takes 2 arguments");
  const Plan* plan = static_cast<Plan*>(plan_of(arguments[0]));
  const void* from = PyLong_AsVoidPtr(arguments[1]);
  if (PyErr_Occurred()) return nullptr;
  bool kept = false;
  if (!without_gil([&] { kept = plan->keeps(from); })) return nullptr;
  return PyBool_FromLong(kept);
}

// fingerprint(address, bytes) -> int, of 64 bits
PyObject* fingerprint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "fingerprint takes 2 arguments");
  const void* memory = PyLong_AsVoidPtr(arguments[0]);
  const int64_t bytes = PyLong_AsLongLong(arguments[1]);
  if (PyErr_Occurred()) return nullptr;
  uint64_t found = 0;
  if (!without_gil([&] { found = swalp_fx::fingerprint(memory, bytes); })) return nullptr;
  return PyLong_FromUnsignedLongLong(found);
}

// codes(plan, x, packed, scales, second, key, stream) -> bool: addresses of memory, as for round.
PyObject* codes(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "codes takes 7 arguments");
  const CodePlan* plan = static_cast<CodePlan*>(plan_of(arguments[0]));
  void* memory[5];
  for (int i = 0; i < 5; ++i) memory[i] = PyLong_AsVoidPtr(arguments[1 + i]);
  const auto stream = static_cast<uint64_t>(PyLong_AsUnsignedLongLongMask(arguments[6]));
  if (PyErr_Occurred()) return nullptr;
  const uint64_t key = memory[4] == nullptr ? 0 : *static_cast<const uint64_t*>(memory[4]);
  bool made = false;
  const auto write = [&] { made = plan->write(memory[0], memory[1], memory[2], memory[3], key, stream); };
  if (!without_gil(write)) return nullptr;
  return PyBool_FromLong(made);
}

template <class F>
PyCFunction function(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"own", function(&own), METH_O, nullptr},
    {"round", function(&round), METH_FASTCALL, nullptr},
    {"keeps", function(&keeps), METH_FASTCALL, nullptr},
    {"fingerprint", function(&fingerprint), METH_FASTCALL, nullptr},
    {"codes", function(&codes), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
