// What PTX computes: everything that neither touches memory nor concerns other lanes.
#pragma once

#include "program.h"

namespace ptx_on_cpu {

// Sets the action of an instruction, whose operands are there, by what its opcode consists of: {"mul", "wide", "s32"}.
// False where no such instruction is known.
bool set_arithmetic(Instruction& instruction, const std::vector<std::string>& opcode);

}  // namespace ptx_on_cpu
