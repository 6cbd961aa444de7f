// The staged kernels (staged.cuh), compiled apart from the others: for sm_90 and newer alone. no_staged.cpp stands in
// where none of these is built for.
#pragma once

#include "context.h"
#include "plan.h"

namespace accumloss::cuda {

template <typename Acc>
struct ForwardArgs;

// Whether this build holds kernels that a device of that capability runs.
bool is_staged_available(int capability);

// Blocks of the persistent grid.
int64_t staged_blocks(const Plan& plan, int64_t rows, const Device& device);

// T: __nv_bfloat16, __half, float.
template <typename T>
void launch_staged(const char* what, const ForwardArgs<float>& args, bool general, bool with_grad, const Plan& plan,
                   const Device& device, cudaStream_t stream);

}  // namespace accumloss::cuda
