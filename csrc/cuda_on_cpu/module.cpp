// The CUDA functions of the bindings, on the CPU, and what tests want to know and to set of it.
#include "../bindings.h"
#include "cuda_runtime.h"
#include "scheduler.h"

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "tardkd's CUDA kernels run by csrc/cuda_on_cpu, for tests.";
  tardkd::bind_cuda(m);
  m.def("set_kernel_error", [](int error) { cuda_on_cpu::devices.kernel_error = cudaError_t(error); });
  m.def("last_error", [] { return int(cudaGetLastError()); });
  m.def("launches", &cuda_on_cpu::launches, "Kernels launched since the last reset(), in order");
  m.def("reset", &cuda_on_cpu::reset);
  m.def("set_seed", &cuda_on_cpu::set_seed, "Of the order in which blocks and threads run");
  m.def("set_workers", &cuda_on_cpu::set_workers, "Threads of the machine that share a launch's blocks");
}
