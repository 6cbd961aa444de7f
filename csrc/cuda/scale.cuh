// values *= factor, in place; nothing is read where the factor is 1.
#pragma once

#include "arguments.cuh"
#include "group.cuh"

namespace accumloss::cuda {

constexpr int64_t kScaleChunk = 2048;  // elements a warp scales before it moves on
constexpr int kScaleThreads = 256;
constexpr int64_t kScaleBlocks = 2048;  // at most: a launch that finds factor == 1 should end at once

template <typename T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const LogitsView values, const typename Element<T>::Acc* factor_pointer) {
  using Acc = typename Element<T>::Acc;
  const Acc factor = *factor_pointer;
  if (factor == 1) return;
  const Lanes group(kTileThreads / kWarp);
  const int64_t chunks = (values.V + kScaleChunk - 1) / kScaleChunk;  // of a row
  const int64_t warps = gridDim.x * static_cast<int64_t>(kScaleThreads / kWarp);
  for (int64_t task = (blockIdx.x * static_cast<int64_t>(kScaleThreads) + threadIdx.x) / kWarp;
       task < row_count(values) * chunks; task += warps) {
    const int64_t row = task / chunks;
    const int64_t start = (task - row * chunks) * kScaleChunk;
    T* const x = row_start<T>(values, row_at(values, row)) + start;
    const RowSpan<T> span(x, x, values.V - start < kScaleChunk ? values.V - start : kScaleChunk);
    for (int64_t v = group.rank(); v < span.vectors; v += group.size()) {
      Acc part[RowSpan<T>::kWidth];
      Element<T>::unpack(load_vector(x + span.vector_index(v)), part);
#pragma unroll
      for (int i = 0; i < RowSpan<T>::kWidth; ++i) part[i] *= factor;
      stream_vector(x + span.vector_index(v), Element<T>::pack(part));
    }
    for (int64_t s = group.rank(); s < span.scalars(); s += group.size()) {
      T& element = x[span.scalar_index(s)];
      element = Element<T>::narrow(Element<T>::widen(element) * factor);
    }
  }
}

}  // namespace accumloss::cuda
