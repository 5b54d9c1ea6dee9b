// From a kernel's text to what the machine runs.
#pragma once

#include <string>

#include "kernel.h"
#include "module.h"

namespace fastnorm::ptx {

class Names;

// Throws Defect where the module has no such kernel, or has an instruction that the interpreter does not know.
Kernel compile(const Module& module, const std::string& name);

// compile()'s last step: gives registers that are never needed at the same time the same place. nvcc's code names
// thousands; a warp would not fit the processor's caches. (registers.cpp)
void assign_registers(Kernel& kernel, const Names& names);

}  // namespace fastnorm::ptx
