// The staged kernels (staged.cuh), compiled apart from the others: for sm_90 and newer alone. no_staged.cpp stands in
// where none of these is built for.
#pragma once

#include "context.h"
#include "plan.h"

namespace accumloss::cuda {

template <typename Acc>
struct RowArgs;

// Whether this build holds kernels that the current device, of that capability, runs. Where the device has too little
// shared memory for them it is not asked: that would load them, or compile them for it.
bool is_staged_available(int capability);

// How many clusters of a staged plan the current device runs at once. T: __nv_bfloat16, __half, float.
template <typename T>
int64_t staged_clusters(const char* what, bool general, bool with_grad, const Plan& plan, cudaStream_t stream);

// plan.resident: staged_clusters(), at least 1.  tickets: memory of the device.
template <typename T>
void launch_staged(const char* what, const RowArgs<float>& args, bool general, bool with_grad, const Plan& plan,
                   unsigned* tickets, cudaStream_t stream);

// For staged.cu and no_staged.cpp, once for each T.
#define ACCUMLOSS_INSTANTIATE(T)                                                           \
  template int64_t staged_clusters<T>(const char*, bool, bool, const Plan&, cudaStream_t); \
  template void launch_staged<T>(const char*, const RowArgs<float>&, bool, bool, const Plan&, unsigned*, cudaStream_t);

}  // namespace accumloss::cuda
