// Stands in for CUDA's header of this name: what csrc/cuda/quantize.cu calls, on plain memory.
#pragma once

#include "cuda_on_host.h"

using cudaStream_t = void*;
using cudaError_t = int;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned size = 1) : x(size) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return 0;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  cuda_on_host::launch(kernel, config->gridDim.x, config->blockDim.x, arguments...);
  return 0;
}
