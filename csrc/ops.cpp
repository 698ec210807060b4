// The ops' schemas, and the Python module that loading registers them with.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// rounding: a code of csrc/round.h. key: one int64, read only by stochastic rounding. An empty
// `dims` makes the whole tensor one block. The forms ending in _ work in place and return nothing.
STABLE_TORCH_LIBRARY(swalp_fx, m) {
#define SWALP_DEF(name, parameters)                                                                               \
  m.def(name "(Tensor x, " parameters ", int rounding, int random_bits, Tensor? key, int stream) -> Tensor");     \
  m.def(name "_(Tensor(a!) x, " parameters ", int rounding, int random_bits, Tensor? key, int stream) -> ()")
  SWALP_DEF("quantize_fixed", "int wl, int fl, bool symmetric");
  SWALP_DEF("quantize_block", "int wl, int[] dims, bool symmetric, int exponent_bits");
  SWALP_DEF("quantize_float", "int exp, int man, int top");
#undef SWALP_DEF
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
