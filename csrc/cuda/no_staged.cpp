// In the place of staged.cu where no architecture of the build has clusters and bulk copies. choose_plan() then never
// asks for them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "staged.h"

namespace accumloss::cuda {

bool is_staged_available(int) { return false; }
int64_t staged_blocks(const Plan&, int64_t, const Device&) { return 0; }

template <typename T>
void launch_staged(const char*, const ForwardArgs<float>&, bool, bool, const Plan&, const Device&, cudaStream_t) {}

template void launch_staged<__nv_bfloat16>(const char*, const ForwardArgs<float>&, bool, bool, const Plan&,
                                           const Device&, cudaStream_t);
template void launch_staged<__half>(const char*, const ForwardArgs<float>&, bool, bool, const Plan&, const Device&,
                                    cudaStream_t);
template void launch_staged<float>(const char*, const ForwardArgs<float>&, bool, bool, const Plan&, const Device&,
                                   cudaStream_t);

}  // namespace accumloss::cuda
