// What the CUDA side of this build is. Plain C++: included where no CUDA headers are.
#pragma once

namespace tardkd::cuda {

// Version of the CUDA runtime linked in, as 1000 * major + 10 * minor.
int runtime_version();

// Devices the driver shows; 0 without a driver or a GPU, which is no error.
int device_count();

// Why the kernels of this build cannot run on a device, in CUDA's words: its driver is too old for the runtime, or no
// kernel was compiled for what it is. "" where they can. Takes a context on the device.
const char* problem_of(int device);

}  // namespace tardkd::cuda
