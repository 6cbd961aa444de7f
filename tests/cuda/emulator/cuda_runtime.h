// Stands before NVIDIA's header of this name on the include path, so that g++ compiles the kernels and runs them on the
// CPU: types from NVIDIA, everything that executes from emulator.h. See docs/internals/testing-cuda.md.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "emulator.h"
