// The CUDA functions of the bindings, run from their PTX, and what tests and tools want to know and to set of it.
#include "../bindings.h"
#include "runtime.h"

namespace {

namespace py = pybind11;

py::dict described(const ptx_on_cpu::Kernel& kernel) {
  py::list code;
  for (const ptx_on_cpu::Instruction& i : kernel.code) {
    const ptx_on_cpu::Count& count = i.count;
    code.append(py::make_tuple(i.text, i.source, i.line, count.warps, count.lanes, count.units, count.fewest,
                               count.shared_addresses));
  }
  using namespace py::literals;
  return py::dict("name"_a = kernel.name, "entry"_a = kernel.entry, "launches"_a = kernel.launches,
                  "blocks"_a = kernel.blocks, "threads"_a = kernel.threads, "barriers"_a = kernel.barriers,
                  "shared"_a = kernel.shared_bytes, "local"_a = kernel.local_bytes, "code"_a = code);
}

// A launch may touch the tensors that its call has read.
void allow(const tardkd::Tensor& t) {
  int64_t last = 0;
  for (size_t axis = 0; axis < size_t(t.axes); ++axis) last += (t.shape[axis] - 1) * t.strides[axis];
  ptx_on_cpu::allow(uint64_t(t.data), uint64_t((last + 1) * t.bytes), uint64_t(t.bytes));
}

}  // namespace

PYBIND11_MODULE(_ptx_on_cpu, m) {
  m.doc() = "tardkd's CUDA kernels run from their PTX by csrc/ptx_on_cpu, for tests.";
  tardkd::bind_cuda(m);
  m.def(
      "set_bounded", [](bool bounded) { tardkd::on_tensor = bounded ? allow : nullptr; },
      "Whether launches may touch nothing but the tensors of their calls");
  m.def("set_architecture", &ptx_on_cpu::set_architecture);
  m.def("set_seed", &ptx_on_cpu::set_seed, "Of the order in which blocks and warps run");
  m.def("allow", &ptx_on_cpu::allow, "Memory that launches may touch: address, bytes, bytes of an element");
  m.def("forbid_all", &ptx_on_cpu::forbid_all);
  m.def("launches", &ptx_on_cpu::launches, "Kernels launched since the last reset(), in order");
  m.def("reset", &ptx_on_cpu::reset);
  m.def("texts", &ptx_on_cpu::texts, "The PTX of the architecture that runs");
  m.def("replace", &ptx_on_cpu::replace, "PTX whose functions take the place of those of the same names");
  m.def("restore", &ptx_on_cpu::restore);
  m.def("launch", [](const std::string& name, unsigned blocks, unsigned threads, uint64_t shared_bytes,
                     const py::bytes& params) { ptx_on_cpu::launch(name, blocks, threads, shared_bytes, params); });
  m.def("kernels", [] {
    py::list all;
    for (const ptx_on_cpu::Kernel* kernel : ptx_on_cpu::kernels()) all.append(described(*kernel));
    return all;
  });
  m.def("add_cache", &ptx_on_cpu::add_cache, "Bytes of a cache of the second level, blocks that run at a time");
  m.def("traffic", &ptx_on_cpu::traffic, "Bytes read and written behind each cache; takes them away");
  m.def("reset_counts", &ptx_on_cpu::reset_counts);
}
