// In the place of staged.cu where no architecture of the build has clusters and bulk copies. choose_plan() then never
// asks for them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "staged.h"

namespace accumloss::cuda {

bool is_staged_available(int) { return false; }

template <typename T>
int64_t staged_clusters(const char*, bool, bool, const Plan&, cudaStream_t) {
  return 0;
}

template <typename T>
void launch_staged(const char*, const RowArgs<float>&, bool, bool, const Plan&, unsigned*, cudaStream_t) {}

ACCUMLOSS_INSTANTIATE(__nv_bfloat16)
ACCUMLOSS_INSTANTIATE(__half)
ACCUMLOSS_INSTANTIATE(float)

}  // namespace accumloss::cuda
