// Launches the staged kernels. Compiled for sm_90 and newer only.
#include "launch.cuh"
#include "staged.cuh"
#include "staged.h"

namespace accumloss::cuda {

bool is_staged_available(int capability) {
  cudaFuncAttributes attributes;
  if (capability < 90) return false;
  // Built for older architectures than the device's, and without PTX: no kernel image, and the other kernels serve.
  static const bool has_image = [&attributes] {
    const bool found = cudaFuncGetAttributes(&attributes, staged_kernel<float, false, false>) == cudaSuccess;
    if (!found) cudaGetLastError();
    return found;
  }();
  return has_image;
}

int64_t staged_blocks(const Plan& plan, int64_t rows, const Device& device) {
  // A block more of shared memory than it asks for is kept by the device; 2048 threads, and registers for 1024 of them.
  const int64_t by_memory = (max_shared_bytes(device.capability) + 1024) / (plan.shared_bytes + 1024);
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(by_memory, 1024 / plan.threads));
  const int64_t clusters = std::max<int64_t>(1, device.multiprocessors * resident / plan.cluster);
  return std::min(rows, clusters) * plan.cluster;
}

template <typename T>
void launch_staged(const char* what, const ForwardArgs<float>& args, bool general, bool with_grad, const Plan& plan,
                   const Device& device, cudaStream_t stream) {
  const int64_t rows = args.inputs.logits.B * args.inputs.logits.T;
  const Grid grid = {staged_blocks(plan, rows, device), plan.threads, plan.shared_bytes, plan.cluster};
  const StagedShape shape = {plan.stages, static_cast<unsigned>(plan.stage_bytes)};
  auto* const kernel = general ? (with_grad ? staged_kernel<T, true, true> : staged_kernel<T, true, false>)
                               : (with_grad ? staged_kernel<T, false, true> : staged_kernel<T, false, false>);
  launch(what, kernel, grid, stream, args, shape);
}

#define ACCUMLOSS_INSTANTIATE(T)                                                                                 \
  template void launch_staged<T>(const char*, const ForwardArgs<float>&, bool, bool, const Plan&, const Device&, \
                                 cudaStream_t);
ACCUMLOSS_INSTANTIATE(__nv_bfloat16)
ACCUMLOSS_INSTANTIATE(__half)
ACCUMLOSS_INSTANTIATE(float)

}  // namespace accumloss::cuda
