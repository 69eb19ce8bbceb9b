// From the statements of a kernel to the instructions that run.
#pragma once

#include <memory>

#include "program.h"

namespace ptx_on_cpu {

// Functions that the kernel calls become part of it. An instruction that is not known here is an error that names it.
std::unique_ptr<Kernel> translate(const Module& module, const Function& entry);

}  // namespace ptx_on_cpu
