// The ops' schemas, and the Python module that loading registers them with.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// rounding: a code of csrc/round.h. key: one int64, read only by stochastic rounding. dims, axis, size: which
// elements share a scale, see blocks_of in csrc/check.h. The forms ending in _ work in place and return nothing.
#define SWALP_ROUNDING "int rounding, int random_bits, Tensor? key, "
#define SWALP_BLOCKS "int[] dims, int axis, int size, "

STABLE_TORCH_LIBRARY(swalp_fx, m) {
#define SWALP_DEF(name, parameters)                                                             \
  m.def(name "(Tensor x, " parameters SWALP_ROUNDING "int stream) -> Tensor");                  \
  m.def(name "_(Tensor(a!) x, " parameters SWALP_ROUNDING "int stream) -> ()");                 \
  m.def(name "_foreach_(Tensor(a!)[] xs, " parameters SWALP_ROUNDING "int[] streams) -> ()")
  SWALP_DEF("quantize_fixed", "int wl, int fl, bool symmetric, ");
  SWALP_DEF("quantize_block", "int wl, bool symmetric, int smallest_exponent, int largest_exponent, " SWALP_BLOCKS);
  SWALP_DEF("quantize_float", "int exp, int man, int top, ");
  SWALP_DEF("quantize_microscaling", "int exp, int man, int top, int largest_exponent, " SWALP_BLOCKS);
  SWALP_DEF("quantize_integer", "int wl, " SWALP_BLOCKS);
  SWALP_DEF("quantize_nvfp4", SWALP_BLOCKS);
#undef SWALP_DEF
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
