// Two of the kernels, for a test that has no time for all: what __stcs, vector loads and bulk copies become.
#include "block.cuh"
#include "staged.cuh"

namespace accumloss::cuda {

template __global__ void staged_kernel<__nv_bfloat16, false, true>(const __grid_constant__ RowArgs<float>,
                                                                   const __grid_constant__ StagedShape);
template __global__ void held_kernel<__nv_bfloat16>(const __grid_constant__ RowArgs<float>, const HeldShape);

}  // namespace accumloss::cuda
