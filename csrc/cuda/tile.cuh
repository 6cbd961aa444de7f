// Cross-entropy of short rows without options, by a few lanes of a warp each: forward, backward, or both. A row is read
// once, all of it at once, and waits in registers, as its exponentials do for the gradient, which may go over it. What
// has to be known of a group's rows before is read by a lane each. An ignored row is not read.
#pragma once

#include "group.cuh"
#include "slice.cuh"

namespace accumloss::cuda {

// Vectors of a row in a lane: all of a row of kPackedClasses with 8 lanes, of kWarpClasses with a warp.
template <typename T>
constexpr int kTileVectors = static_cast<int>(kTileElements) / Slice<T>::kWidth;
// And of its elements that are not in whole vectors, in the fewest lanes.
template <typename T>
constexpr int kTileEnds = (2 * (Slice<T>::kWidth - 1) + kFewestLanes - 1) / kFewestLanes;

// exp(x - high - low), which is the sum's term and the gradient's alike. The difference of two numbers of 16 bits is
// exact in float, or so large that its rounding does not matter.
template <typename T>
__device__ __forceinline__ float tile_exp(float x, float high, float low) {
  if constexpr (kIsHalf<T>) return exp2_flushed((x - high) * kLog2e);
  return exp_difference<true>(x, high, low);
}

template <typename T, bool kSums, bool kGrad>
__global__ void __launch_bounds__(kTileThreads, 2)
    tile_kernel(const __grid_constant__ RowArgs<typename Element<T>::Acc> args, int groups) {
  constexpr int kWidth = Slice<T>::kWidth, kVectors = kTileVectors<T>, kEnds = kTileEnds<T>;
  constexpr int kInVectors = kVectors * kWidth;
  if (kSums) begin_rows(args);
  const CrossEntropyInputs& inputs = args.inputs;
  const Lanes group(groups);
  const int rank = group.rank(), size = group.size();
  const int V = static_cast<int>(inputs.logits.V);
  const int64_t rows = row_count(inputs.logits);
  const int64_t first = (blockIdx.x * static_cast<int64_t>(groups) + group.index()) * kTileRows;
  const FactorView<float, false> factors(args.factor, inputs, kGrad ? incoming_gradient(args) : 0.0f);

  // Of the rank-th row.
  int64_t my_in = 0, my_out = 0;
  int my_label = kNoLabel;
  float my_logit = 0, my_weight = 0;
  RowFactor<float> my_factor = {};
  if (rank < kTileRows && first + rank < rows) {
    const RowAt at = row_at(inputs.logits, first + rank);
    const int64_t label = row_label(inputs, at);
    my_in = row_offset(inputs.logits, at);
    if (kGrad) my_out = row_offset(args.grad_logits, at);
    if (is_item(inputs, label) && (kSums || is_wanted(args, first + rank))) {
      my_label = static_cast<int>(label - inputs.options.class_offset);
      my_weight = class_weight<float>(inputs, my_label);
      if (kSums) {
        my_logit = Element<T>::widen(static_cast<const T*>(inputs.logits.data)[my_in + my_label]);
      } else {
        my_factor = factors.template of_lse<!kIsHalf<T>>(args.lse[first + rank], args.nll[first + rank], my_weight,
                                                         incoming_gradients(args, first + rank));
      }
    }
  }

  __syncwarp(kAllLanes);  // the labels' logits have been read before another lane writes over them

  // All lanes of a warp go through this together: of a row that is no item nothing is read, and zeros are written.
#pragma unroll 1
  for (int i = 0; i < kTileRows; ++i) {
    const int label = group.of(my_label, i);
    const T* const x = static_cast<const T*>(inputs.logits.data) + group.of(my_in, i);
    T* const out = kGrad ? static_cast<T*>(args.grad_logits.data) + group.of(my_out, i) : nullptr;
    const Slice<T> slice(x, V, 0, 0);
    const bool is_row = first + i < rows, is_read = label != kNoLabel;
    if (!__any_sync(kAllLanes, is_read)) {
      if (kGrad && is_row) write_zero_slice(slice, out, rank, size);
      continue;
    }
    const T* const stage = x + slice.offset;
    const int place = label - slice.offset;  // of the label, if it is in this shard
    const bool has_label = static_cast<unsigned>(label) < static_cast<unsigned>(V);
    const bool is_owner = is_read && has_label && (slice.thread_of(place, size) & (size - 1)) == rank;

    // Of a short row most lanes have fewer vectors: what is not there is stepped over, all of a warp at once.
    const auto has_vectors = [&](int k) { return slice.begin + k * size < slice.end; };
    const auto has_ends = [&](int k) { return k * size < slice.ends(); };
    typename Element<T>::Raw raw[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int v = slice.begin + rank + k * size;
      raw[k] = lowest_vector<T>();
      if (is_read && v < slice.end) raw[k] = load_vector(stage + v * kWidth);
    }
    float ends[kEnds];
#pragma unroll
    for (int k = 0; k < kEnds; ++k) {
      const int end = rank + k * size;
      ends[k] = -INFINITY;
      if (is_read && end < slice.ends()) ends[k] = Element<T>::widen(stage[slice.end_at(end)]);
    }
    if (kSums && is_owner) {
      const int vector = place / kWidth;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (slice.begin + rank + k * size == vector) raw[k] = without<T>(raw[k], place % kWidth);
      }
#pragma unroll
      for (int k = 0; k < kEnds; ++k) {
        if (rank + k * size < slice.ends() && slice.end_at(rank + k * size) == place) ends[k] = -INFINITY;
      }
    }

    RowFactor<float> factor;
    RowState<float> state;
    float high = 0, low = 0;
    float e[kInVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float part[kWidth];
      Element<T>::unpack(raw[k], part);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) e[k * kWidth + j] = part[j];
    }
    if (kSums) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (!has_vectors(k)) break;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) state.max = fmaxf(state.max, e[k * kWidth + j]);  // drops a NaN
      }
#pragma unroll
      for (int k = 0; k < kEnds; ++k) state.max = fmaxf(state.max, ends[k]);
      state.max = warp_max(state.max, kAllLanes, size);
      high = state.max == -INFINITY ? 0.0f : state.max;
    } else {
      factor.high = group.of(my_factor.high, i);
      factor.low = group.of(my_factor.low, i);
      factor.probability = group.of(my_factor.probability, i);
      factor.target = group.of(my_factor.target, i);
      high = factor.high;
      low = factor.low;
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!has_vectors(k)) break;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) e[k * kWidth + j] = tile_exp<T>(e[k * kWidth + j], high, low);
      if (kSums) sum = pairwise_sum<kWidth>(e + k * kWidth);
      state.sum += sum;
    }
#pragma unroll
    for (int k = 0; k < kEnds; ++k) {
      if (!has_ends(k)) break;
      ends[k] = tile_exp<T>(ends[k], high, low);
      state.sum += ends[k];
    }
    if (kSums) {
      state.sum = warp_sum(state.sum, kAllLanes, size);
      const float z_label = group.of(my_logit, i);
      if (is_read && rank == 0) record_row<false>(args, first + i, state, z_label, false);
      if (!kGrad) continue;
      factor = factors.of(state, z_label, group.of(my_weight, i));
    }
    if (!is_row) continue;
    if (!is_read) factor.probability = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!has_vectors(k)) break;
      const int v = slice.begin + rank + k * size;
      float part[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) part[j] = factor.probability * e[k * kWidth + j];
      if (v < slice.end) stream_vector(out + slice.class_of(v), Element<T>::pack(part));
    }
#pragma unroll
    for (int k = 0; k < kEnds; ++k) {
      const int end = rank + k * size;
      if (end < slice.ends()) out[slice.offset + slice.end_at(end)] = Element<T>::narrow(factor.probability * ends[k]);
    }
    // Over what its vector has there, which the same thread has written.
    if (is_owner) out[label] = Element<T>::narrow(factor.target);
  }
}

}  // namespace accumloss::cuda
