// The ops' schemas, and the Python module that loading registers them with.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// rounding: a code of csrc/round.h. key: one int64, read only by stochastic rounding. dims, axis, size: which
// elements share a scale, see blocks_of in csrc/check.h. The forms ending in _ work in place and return nothing.
// On the CPU alone: _sgd_, a step of torch.optim.SGD with its roundings, where a role without streams is not rounded and
// undamped is 1 - dampening; and _keeps, whether x is known to be representable, so that every rounding keeps its bits.
#define SWALP_ROUNDING "int rounding, int random_bits, Tensor? key, "
#define SWALP_BLOCKS "int[] dims, int axis, int size, "
#define SWALP_SGD "float lr, float momentum, float undamped, float weight_decay, bool nesterov, bool maximize, "

STABLE_TORCH_LIBRARY(swalp_fx, m) {
#define SWALP_DEF(name, parameters)                                                             \
  m.def(name "(Tensor x, " parameters SWALP_ROUNDING "int stream) -> Tensor");                  \
  m.def(name "_(Tensor(a!) x, " parameters SWALP_ROUNDING "int stream) -> ()");                 \
  m.def(name "_foreach_(Tensor(a!)[] xs, " parameters SWALP_ROUNDING "int[] streams) -> ()");   \
  m.def(name "_sgd_(Tensor(a!)[] weights, Tensor(b!)[] gradients, Tensor(c!)[] momenta, " SWALP_SGD parameters        \
             SWALP_ROUNDING "int[] weight_streams, int[] gradient_streams, int[] momentum_streams) -> ()")
#define SWALP_DEF_EXACT(name, parameters) \
  SWALP_DEF(name, parameters);            \
  m.def(name "_keeps(" parameters "Tensor x) -> bool")
  SWALP_DEF_EXACT("quantize_fixed", "int wl, int fl, bool symmetric, ");
  SWALP_DEF_EXACT("quantize_block", "int wl, bool symmetric, int smallest_exponent, int largest_exponent, " SWALP_BLOCKS);
  SWALP_DEF_EXACT("quantize_float", "int exp, int man, int top, ");
  SWALP_DEF_EXACT("quantize_microscaling", "int exp, int man, int top, int largest_exponent, " SWALP_BLOCKS);
  SWALP_DEF("quantize_integer", "int wl, " SWALP_BLOCKS);
  SWALP_DEF("quantize_nvfp4", SWALP_BLOCKS);
#undef SWALP_DEF_EXACT
#undef SWALP_DEF
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
