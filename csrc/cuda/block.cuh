// Cross-entropy of a row without options by a block: forward, backward, or both.
//
// block_kernel reads the row a second time for its gradient. held_kernel, before sm_90, keeps it in shared memory; its
// blocks are persistent. A thread brings what it reads itself, by copies of its own, so that nobody waits for another
// but where the sums of the row are merged; as soon as it has written its part of a row's gradient, it has its part of
// the block's next row brought into the same place. An ignored row is not read.
//
// Of a row that does not fit the first vectors are held. The rest is read a second time, from the L2: backwards, so
// that what was read last, which the L2 keeps longest, comes first; and as lines that nobody needs again, which those
// of what is held are from their beginning.
#pragma once

#include "copies.cuh"
#include "group.cuh"
#include "slice.cuh"

namespace accumloss::cuda {

// The sums of a row in global memory, the same in every thread. label: outside of [0, V) where the label is another
// shard's.
template <typename T>
__device__ __forceinline__ RowState<float> reduce_block(BlockGroup& group, const T* x, int V, int label) {
  const Slice<T> slice(x, V, 0, 0);
  const T* const stage = x + slice.offset;
  const int place = static_cast<unsigned>(label) < static_cast<unsigned>(V) ? label - slice.offset : -1;
  const int thread = group.rank(), size = group.size();
  RowState<float> state = group.merge<false>(reduce_slice<true, PlainSum<T>>(slice, stage, thread, size, place));
  if (is_large<T>(state.max)) {  // the same decision in all threads
    state = group.merge<false>(reduce_large<true>(slice, stage, thread, size, place));
  }
  return state;
}

template <typename T, bool kSums, bool kGrad>
__global__ void __launch_bounds__(kMaxThreads, 2)
    block_kernel(const __grid_constant__ RowArgs<typename Element<T>::Acc> args) {
  if (kSums) begin_rows(args);
  const CrossEntropyInputs& inputs = args.inputs;
  const int V = static_cast<int>(inputs.logits.V);
  const int64_t row = blockIdx.x;
  BlockGroup group;
  const int thread = group.rank(), size = group.size();
  const RowAt at = row_at(inputs.logits, row);
  const int64_t label_of_all = row_label(inputs, at);
  T* const out = kGrad ? row_start<T>(args.grad_logits, at) : nullptr;
  if (!is_item(inputs, label_of_all) || (!kSums && !is_wanted(args, row))) {
    if (kGrad) write_zero_slice(Slice<T>(out, V, 0, 0), out, thread, size);
    return;
  }
  const int label = static_cast<int>(label_of_all - inputs.options.class_offset);
  const bool has_label = static_cast<unsigned>(label) < static_cast<unsigned>(V);
  const T* const x = row_start<T>(inputs.logits, at);
  const Slice<T> slice(x, V, 0, 0);
  const FactorView<float, false> factors(args.factor, inputs, kGrad ? incoming_gradient(args) : 0.0f);
  const float weight = class_weight<float>(inputs, label);
  RowFactor<float> factor;
  if (kSums) {
    const float z_label = Element<T>::widen(x[label]);  // before anything is written over it
    const RowState<float> state = reduce_block(group, x, V, label);
    if (thread == 0) record_row<false>(args, row, state, z_label, false);
    if (!kGrad) return;
    factor = factors.of(state, z_label, weight);
  } else {
    factor = factors.template of_lse<!kIsHalf<T>>(args.lse[row], args.nll[row], weight, incoming_gradients(args, row));
  }
  write_plain(slice, x + slice.offset, out, thread, size, factor);
  // Over what its vector has there, which the same thread has written.
  if (has_label && slice.thread_of(label - slice.offset, size) == thread)
    out[label] = Element<T>::narrow(factor.target);
}

// A row that a block has before it. Its label is asked for two rows ahead, what the label points at one row ahead:
// nobody waits for them.
template <typename T>
struct HeldRow {
  const T* x;
  T* out;
  int64_t label_of_all;
  int label;  // or kNoLabel
  float z_label, weight;

  __device__ __forceinline__ Slice<T> slice(int V) const { return Slice<T>(x, V, 0, 0); }
};

// What is held of every row: parts, brought and reduced one after the other, of so many vectors, whole passes.
struct HeldShape {
  int parts, part;
};

template <typename T>
struct HeldBlock {
  static constexpr int kWidth = Slice<T>::kWidth;

  const RowArgs<float>& args;
  T* stage;
  int V;
  int thread, size;
  int pass;  // vectors that all threads take at once
  int parts, part;
  CopyPolicy policy;

  __device__ __forceinline__ HeldBlock(const RowArgs<float>& arguments, const HeldShape& shape)
      : args(arguments),
        stage(reinterpret_cast<T*>(dynamic_shared() + kHeldHeader)),
        V(static_cast<int>(arguments.inputs.logits.V)),
        thread(static_cast<int>(threadIdx.x)),
        size(static_cast<int>(blockDim.x)),
        pass(kSliceVectors * size),
        parts(shape.parts),
        part(shape.part) {}

  // Vectors that are held, if the row has so many.
  __device__ __forceinline__ int held() const { return parts * part; }

  __device__ __forceinline__ HeldRow<T> row_of(int64_t row) const {
    const CrossEntropyInputs& inputs = args.inputs;
    if (row >= row_count(inputs.logits)) return {nullptr, nullptr, inputs.options.ignore_index, kNoLabel, 0, 0};
    const RowAt at = row_at(inputs.logits, row);
    return {row_start<T>(inputs.logits, at), row_start<T>(args.grad_logits, at), row_label(inputs, at), kNoLabel, 0, 0};
  }
  // Of the label, before anything is written over it.
  __device__ __forceinline__ HeldRow<T> looked_at(HeldRow<T> row) const {
    if (is_item(args.inputs, row.label_of_all)) {
      row.label = static_cast<int>(row.label_of_all);
      row.z_label = Element<T>::widen(row.x[row.label]);
      row.weight = class_weight<float>(args.inputs, row.label);
    }
    return row;
  }

  // One vector of a row into its place, in the thread that will read it; rounded out to 16 bytes at the row's ends.
  __device__ __forceinline__ void bring(const HeldRow<T>& row, const Slice<T>& slice, int vector) const {
    if (row.label == kNoLabel || vector >= slice.count) return;
    const int j = slice.class_of(vector), over = j + kWidth - V;
    constexpr int kSize = static_cast<int>(sizeof(T));
    copy_vector(stage + vector * kWidth, row.x + j, (j < 0 ? -j : 0) * kSize, (over > 0 ? over : 0) * kSize, policy);
  }
  __device__ __forceinline__ void bring_all(const HeldRow<T>& row) const {
    const Slice<T> slice = row.slice(V);
#pragma unroll 1
    for (int p = 0; p < parts; ++p) {
#pragma unroll 1
      for (int v = p * part + thread; v < (p + 1) * part; v += size) bring(row, slice, v);
      copies_commit();
    }
  }

  __device__ __forceinline__ bool owns(int vector, int p) const {
    return (vector & (size - 1)) == thread && vector >= p * part && vector < (p + 1) * part;
  }
  // -inf in a part's places that are no other class: of the label, and around the row.
  __device__ __forceinline__ void take_out(const HeldRow<T>& row, const Slice<T>& slice, int p) const {
    const T lowest = Element<T>::narrow(-INFINITY);
    const int place = row.label - slice.offset;
    if (owns(place / kWidth, p)) stage[place] = lowest;
    if (slice.offset < 0 && owns(0, p)) {
      for (int i = 0; i < -slice.offset; ++i) stage[i] = lowest;
    }
    if (owns(slice.count - 1, p)) {
      for (int i = V - slice.offset; i < slice.count * kWidth; ++i) stage[i] = lowest;
    }
  }

  __device__ __forceinline__ RowState<float> reduce(const HeldRow<T>& row, const Slice<T>& slice) const {
    PlainSum<T> sums;
    // Half of the warps begin with the rest: so the memory is read all the time.
    const int first = thread / kWarp % 2;
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == first) {
        reduce_rest<kSliceVectors>(sums, row, slice);
        continue;
      }
#pragma unroll 1
      for (int p = 0; p < parts; ++p) {
        copies_wait(parts - 1 - p);
        take_out(row, slice, p);
        const int end = (p + 1) * part < slice.count ? (p + 1) * part : slice.count;
        reduce_vectors<false, kSliceVectors>(sums, stage, p * part, end, thread, size);
      }
    }
    return sums.state();
  }

  // What is not held. A vector that is not all the row's at its end is its thread's, element by element.
  template <int kVectors, typename Sum>
  __device__ __forceinline__ void reduce_rest(Sum& sums, const HeldRow<T>& row, const Slice<T>& slice) const {
    const T* const from = row.x + slice.offset;
    const int label = row.label - slice.offset;
    reduce_vectors<true, kVectors, true>(sums, from, held(), slice.end, thread, size, label);
    if (has_end(slice)) {
#pragma unroll 1
      for (int i = slice.end * kWidth; i < slice.end * kWidth + slice.back; ++i) {
        sums.push_one(i == label ? -INFINITY : Element<T>::widen(from[i]));
      }
    }
  }
  template <int kVectors, typename Gradient>
  __device__ __forceinline__ void write_rest(const HeldRow<T>& row, const Slice<T>& slice,
                                             const Gradient& gradient) const {
    const T* const from = row.x + slice.offset;
    T* const to = row.out + slice.offset;
    if (has_end(slice)) {
#pragma unroll 1
      for (int i = slice.end * kWidth; i < slice.end * kWidth + slice.back; ++i) {
        to[i] = Element<T>::narrow(gradient(Element<T>::widen(from[i])));
      }
    }
    // The last pass first, which may not be whole.
    const int step = kVectors * size, passes = slice.end > held() ? (slice.end - held() + step - 1) / step : 0;
    int v = held() + thread + (passes - 1) * step;
    if (passes > 0 && v + (kVectors - 1) * size >= slice.end) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int at = (v + k * size) * kWidth;
        if (v + k * size < slice.end) stream_vector(to + at, gradient_of<T>(load_last(from + at), gradient));
      }
      v -= step;
    }
#pragma unroll 1
    for (; v >= held(); v -= step) {
      typename Element<T>::Raw raw[kVectors];
#pragma unroll
      for (int k = 0; k < kVectors; ++k) raw[k] = load_last(from + (v + k * size) * kWidth);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) stream_vector(to + (v + k * size) * kWidth, gradient_of<T>(raw[k], gradient));
    }
  }
  // Whether the row ends with a vector that is not all its own, is not held, and is the thread's.
  __device__ __forceinline__ bool has_end(const Slice<T>& slice) const {
    return slice.back > 0 && slice.end >= held() && (slice.end & (size - 1)) == thread;
  }

  // The vectors of a thread are those of its parts: other threads' lie elsewhere, and none waits for them.
  template <typename Gradient>
  __device__ __forceinline__ void write(const HeldRow<T>& row, const Slice<T>& slice, const HeldRow<T>& next,
                                        const Gradient& gradient) const {
    const Slice<T> after = next.slice(V);
    const auto write_one = [&](int v) {
      const int j = slice.class_of(v);
      if (v >= slice.begin && v < slice.end) {
        stream_vector(row.out + j, gradient_of<T>(load_vector(stage + v * kWidth), gradient));
      } else if (v < slice.count) {
#pragma unroll 1
        for (int i = 0; i < kWidth; ++i) {
          if (j + i < 0 || j + i >= V) continue;
          row.out[j + i] = Element<T>::narrow(gradient(Element<T>::widen(stage[v * kWidth + i])));
        }
      }
    };
#pragma unroll 1
    for (int p = 0; p < parts; ++p) {
      const int most = slice.count > after.count ? slice.count : after.count;
      const int end = (p + 1) * part < most ? (p + 1) * part : most;
#pragma unroll 1
      for (int v = p * part + thread; v < end; v += pass) {
        typename Element<T>::Raw raw[kSliceVectors];
        if (v >= slice.begin && v + (kSliceVectors - 1) * size < slice.end) {
#pragma unroll
          for (int k = 0; k < kSliceVectors; ++k) raw[k] = load_vector(stage + (v + k * size) * kWidth);
#pragma unroll
          for (int k = 0; k < kSliceVectors; ++k) {
            stream_vector(row.out + slice.class_of(v + k * size), gradient_of<T>(raw[k], gradient));
          }
        } else {
#pragma unroll 1
          for (int k = 0; k < kSliceVectors; ++k) write_one(v + k * size);
        }
#pragma unroll
        for (int k = 0; k < kSliceVectors; ++k) {
          bring(next, after, v + k * size);
        }
      }
      copies_commit();
    }
  }
};

// As HeldBlock's, of a row whose logits are too large for the fused exponent.
template <typename T>
__device__ __noinline__ RowState<float> reduce_held_large(const HeldBlock<T> block, const HeldRow<T> row) {
  const Slice<T> slice = row.slice(block.V);
  ExactSum<T> sums;
  block.template reduce_rest<1>(sums, row, slice);
  const int count = slice.count < block.held() ? slice.count : block.held();
  reduce_vectors<false, 1>(sums, block.stage, 0, count, block.thread, block.size);
  return sums.state();
}
template <typename T>
__device__ __noinline__ void write_held_large(const HeldBlock<T> block, const HeldRow<T> row, const HeldRow<T> next,
                                              const RowFactor<float> factor) {
  const Slice<T> slice = row.slice(block.V);
  const ExactGradient<T> gradient(factor);
  block.write(row, slice, next, gradient);
  block.template write_rest<1>(row, slice, gradient);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    held_kernel(const __grid_constant__ RowArgs<typename Element<T>::Acc> args, const HeldShape shape) {
  begin_rows(args);
  const HeldBlock<T> block(args, shape);
  const int64_t rows = row_count(args.inputs.logits);
  const FactorView<float, false> factors(args.factor, args.inputs, incoming_gradient(args));
  BlockGroup group;
  HeldRow<T> next = block.looked_at(block.row_of(blockIdx.x));
  HeldRow<T> after = block.row_of(blockIdx.x + static_cast<int64_t>(gridDim.x));
  block.bring_all(next);
#pragma unroll 1
  for (int64_t number = blockIdx.x; number < rows; number += gridDim.x) {
    const HeldRow<T> row = next;
    next = block.looked_at(after);
    after = block.row_of(number + 2 * static_cast<int64_t>(gridDim.x));
    const Slice<T> slice = row.slice(block.V);
    if (row.label == kNoLabel) {
      write_zero_slice(slice, row.out, block.thread, block.size);
      block.bring_all(next);
      continue;
    }
    RowState<float> state = group.merge<false>(block.reduce(row, slice));
    const bool large = is_large<T>(state.max);  // the same decision in all threads
    if (large) state = group.merge<false>(reduce_held_large(block, row));
    if (block.thread == 0) record_row<false>(args, number, state, row.z_label, false);
    const RowFactor<float> factor = factors.of(state, row.z_label, row.weight);
    if (large) {
      write_held_large(block, row, next, factor);
    } else {
      const PlainGradient<T> gradient(factor);
      block.write(row, slice, next, gradient);
      block.template write_rest<kSliceVectors>(row, slice, gradient);
    }
    // Over what its vector has there, which the same thread has written.
    const int vector = (row.label - slice.offset) / Slice<T>::kWidth;
    if ((vector & (block.size - 1)) == block.thread) row.out[row.label] = Element<T>::narrow(factor.target);
  }
}

}  // namespace accumloss::cuda
