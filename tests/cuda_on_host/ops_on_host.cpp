// The CUDA ops as they are launched, but on CPU tensors: csrc/cuda/quantize.cu with its kernels run by
// cuda_on_host.h. They are torch.ops.swalp_fx_on_host.<op>, beside the CPU's torch.ops.swalp_fx.<op>.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

// No device to guard, no stream to ask for, no CUDA error to look up.
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, AOTI_TORCH_SUCCESS)
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) static_cast<void>(call)

// The same schemas and registrations under another name, for another device.
#define swalp_fx swalp_fx_on_host
#define CUDA CPU
#include "../../csrc/cuda/quantize.cu"
#include "../../csrc/ops.cpp"
