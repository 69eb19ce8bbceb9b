#include "runtime.h"

#include <cuda_runtime.h>

// Compiled here so that a host/device mistake in the shared maths is found wherever nvcc is.
#include "../core/axis.h"
#include "../core/classification.h"
#include "../core/penalty.h"
#include "../core/region.h"
#include "kernels.h"
#include "primitives.cuh"

namespace tardkd::cuda {
namespace {

__global__ void probed_kernel() {}

}  // namespace

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* problem_of(int device) {
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probed_kernel));
    if (error != cudaSuccess) cudaGetLastError();  // it is reported here and must not surface in an unrelated call
  }
  return error == cudaSuccess ? "" : error_text(error);
}

const char* error_text(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace tardkd::cuda
