// Stands in for the CUDA runtime under the host code that nvcc compiles: a launch is looked up in the PTX that came
// with that code, and runs here, on plain host memory, until it is done. For tests; see execution.cpp and
// tests/ptx_on_cpu.py.
#pragma once

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
void replace(const std::string& ptx);  // its functions take the place of those of the same names
void restore();                        // to what was compiled

// Launches `name` as the PTX spells it: `blocks` of `threads`, with the bytes of its parameters.
void launch(const std::string& name, unsigned blocks, unsigned threads, uint64_t shared_bytes,
            const std::string& params);

std::vector<const Kernel*> kernels();  // launched so far, with their counts
void reset_counts();

}  // namespace ptx_on_cpu
