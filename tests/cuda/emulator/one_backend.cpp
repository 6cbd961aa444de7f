// The backend for one element type alone, in the place of cross_entropy.cu: the tests that plant a fault compile it for
// each. They take the other instantiations out of their copy of staged.cu.
#include "launchers.cuh"
#include "pairs.h"

namespace accumloss {

const Backend& cuda_backend() {
  using One = cuda::Launchers<ELEMENT>;
  static const Backend backend = {One::forward,
                                  One::backward,
                                  One::forward_with_grad,
                                  One::forward_shard,
                                  One::scale,
                                  nullptr,
                                  nullptr,
                                  One::forward_tokens,
                                  One::backward_tokens,
                                  cuda::forward_distillation,
                                  cuda::backward_distillation,
                                  cuda::forward_targets,
                                  cuda::backward_targets};
  return backend;
}

}  // namespace accumloss
