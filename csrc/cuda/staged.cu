// Launches the staged kernels. Compiled for sm_90 and newer only, and not for sm_120.
#include "launch.cuh"
#include "staged.cuh"
#include "staged.h"

namespace accumloss::cuda {
namespace {

template <typename T>
auto* kernel_of(bool general, bool with_grad) {
  return general     ? staged_kernel<T, true, true>
         : with_grad ? staged_kernel<T, false, true>
                     : staged_kernel<T, false, false>;
}

}  // namespace

bool is_staged_available(int capability) {
  if (capability < 90 || max_shared_bytes(capability) < kStagedSharedBytes) return false;
  // Built for older architectures than the device's, and without PTX: no image, and the other kernels serve.
  return load("cross_entropy", reinterpret_cast<const void*>(staged_kernel<float, false, false>)) == cudaSuccess;
}

template <typename T>
int64_t staged_clusters(const char* what, bool general, bool with_grad, const Plan& plan, cudaStream_t stream) {
  const Grid grid = {plan.cluster, plan.threads, plan.shared_bytes, plan.cluster};
  return resident_clusters(what, reinterpret_cast<const void*>(kernel_of<T>(general, with_grad)), grid, stream);
}

// One more cluster than the device runs at once would begin when the others have ended, and find no row left.
template <typename T>
void launch_staged(const char* what, const RowArgs<float>& args, bool general, bool with_grad, const Plan& plan,
                   unsigned* tickets, cudaStream_t stream) {
  const int64_t rows = args.inputs.logits.B * args.inputs.logits.T;
  if (rows > 0x7fffffff) {
    throw std::runtime_error(std::string("accumloss: ") + what + ": expected at most 2147483647 rows, got " +
                             std::to_string(rows) + "; split them over several calls");
  }
  const int64_t clusters = std::min(rows, plan.resident);
  const Grid grid = {clusters * plan.cluster, plan.threads, plan.shared_bytes, plan.cluster};
  check(cudaMemsetAsync(tickets, 0, sizeof(unsigned), stream), what);
  const StagedShape shape = {plan.stages,
                             static_cast<unsigned>(plan.stage_bytes),
                             static_cast<unsigned>(plan.header_bytes),
                             plan.groups,
                             (plan.threads - kStagedHelpers) / (kWarp * plan.groups),
                             tickets};
  launch(what, kernel_of<T>(general, with_grad), grid, stream, args, shape);
}

ACCUMLOSS_INSTANTIATE(__nv_bfloat16)
ACCUMLOSS_INSTANTIATE(__half)
ACCUMLOSS_INSTANTIATE(float)

}  // namespace accumloss::cuda
