// Stands in for the CUDA runtime under the host code that nvcc compiles: a launch is looked up in the PTX that came
// with that code, and runs here, on plain host memory, until it is done. For tests; see execution.cpp and
// tests/ptx_on_cpu.py.
#pragma once

#include <utility>

#include "program.h"

namespace ptx_on_cpu {

void set_architecture(int architecture);  // which of the compiled ones runs, such as 90
void set_seed(uint64_t seed);             // of the order in which blocks and warps run

// Global memory that launches may touch, in elements of `item` bytes. Until something is allowed, all is.
void allow(uint64_t address, uint64_t bytes, uint64_t item);
void forbid_all();

std::vector<std::string> launches();  // kernels launched since the start or reset()
void reset();                         // forgets launches and seed

std::vector<std::string> texts();      // the PTX of the architecture that runs
void replace(const std::string& ptx);  // its functions take the place of those of the same names, until restore()
void restore();

// Launches `name` as the PTX spells it: `blocks` of `threads`, with the bytes of its parameters.
void launch(const std::string& name, unsigned blocks, unsigned threads, uint64_t shared_bytes,
            const std::string& params);

std::vector<const Kernel*> kernels();  // launched so far, with their counts
void reset_counts();

// From here on a cache of so many bytes stands before global memory, for so many blocks at a time, beside those that
// were added before; traffic() says which bytes each has read and written behind it until then, and takes them away.
void add_cache(uint64_t bytes, uint64_t resident);
std::vector<std::pair<uint64_t, uint64_t>> traffic();

}  // namespace ptx_on_cpu
