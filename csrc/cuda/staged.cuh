// Cross-entropy of a row by a cluster of blocks that holds it in shared memory, for sm_90 and newer: forward, or
// forward and gradient. The clusters are persistent. Each block keeps a ring of stages, one row's slice each, which
// bulk copies fill while earlier rows are reduced; so every logit is read from device memory once. Ignored rows are not
// read.
//
// One exchange a row: each warp writes its sums into the shared memory of every block, and after one barrier all
// threads add the same numbers in the same order.
#pragma once

#include "async.cuh"
#include "cross_entropy.cuh"
#include "plan.h"

namespace accumloss::cuda {

struct StagedShape {
  int stages;
  unsigned stage_bytes;
};

constexpr int kMaxWarps = kMaxThreads / kWarp;

// At the start of dynamic shared memory; the stages follow.
template <typename Acc>
struct StagedShared {
  Mbarrier full[kMaxStages];  // the slice of a row has arrived
  RowGrad<Acc> grad;
  int beaten[kMaxCluster];                           // in block 0: what wins_tie found in each block
  RowState<Acc> states[2][kMaxCluster * kMaxWarps];  // of even rows and odd: one row's are read while the
};  // next one's arrive

// What a block has of one row: `count` vectors from vector `first` on; the last block also the elements at both ends.
template <typename T>
struct Slice {
  RowSpan<T> span;
  int first;
  int count;
  int scalars;  // fewer than two vectors' worth: one a thread

  __device__ __forceinline__ Slice(const T* x, int64_t V, int rank, int blocks) : span(x, x, V) {
    const int vectors = static_cast<int>(span.vectors);
    const int each = (vectors + blocks - 1) / blocks;
    first = rank * each;
    const int left = vectors - first;
    count = left < 0 ? 0 : left < each ? left : each;
    scalars = rank == blocks - 1 ? static_cast<int>(span.scalars()) : 0;
  }

  // Class of the first element of vector v of the slice.
  __device__ __forceinline__ int64_t index(int v) const { return span.vector_index(first + v); }
};

// Every step-th row, by additions: a division for each row and thread would show.
struct Walk {
  int64_t step, step_b, step_t, T;
  int64_t row;
  RowAt at;

  __device__ __forceinline__ Walk(const LogitsView& view, int64_t first, int64_t clusters)
      : step(clusters),
        step_b(clusters / view.T),
        step_t(clusters % view.T),
        T(view.T),
        row(first),
        at(row_at(view, first)) {}

  __device__ __forceinline__ void advance() {
    row += step;
    at.b += step_b;
    at.t += step_t;
    if (at.t >= T) {
      at.t -= T;
      ++at.b;
    }
  }
};

// What is read of a row directly, a row ahead: before its gradient can be written over it.
template <typename T>
struct Peek {
  T label;   // the logit of the label
  T scalar;  // of this thread
};

template <typename T>
__device__ __forceinline__ Peek<T> peek(const CrossEntropyInputs& inputs, const RowAt& at, int64_t label, int rank,
                                        int blocks) {
  const T* const x = row_start<T>(inputs.logits, at);
  const Slice<T> slice(x, inputs.logits.V, rank, blocks);
  const int thread = static_cast<int>(threadIdx.x);
  return {x[label], x[thread < slice.scalars ? slice.span.scalar_index(thread) : 0]};
}

// Adds the classes of a slice, its vectors in shared memory.
template <typename T, bool kGeneral, typename Acc>
__device__ __forceinline__ RowState<Acc> reduce_slice(const Slice<T>& slice, const T* staged, Acc scalar,
                                                      const RowView<Acc, kGeneral>& row) {
  constexpr int kWidth = RowSpan<T>::kWidth;
  constexpr int kVectors = kVectorsInFlight<T, kGeneral>;
  const int size = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  RowState<Acc> state;
  const auto fetch = [&](int v, Acc* z) {
    Acc part[kWidth];
    Element<T>::unpack(load_vector(staged + v * kWidth), part);
    const int64_t j = slice.index(v);
    row.template prepare<kWidth>(part, j, slice.span.label_position(row.label, j), state);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) z[i] = part[i];
  };
  int v = thread;
  for (; v + (kVectors - 1) * size < slice.count; v += kVectors * size) {
    Acc z[kVectors * kWidth];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) fetch(v + k * size, z + k * kWidth);
    row.push(z, state);
  }
  if (kVectors > 1) {
    for (; v < slice.count; v += size) {
      Acc z[kWidth];
      fetch(v, z);
      row.push(z, state);
    }
  }
  if (thread < slice.scalars) {
    const int64_t j = slice.span.scalar_index(thread);
    Acc z[1] = {scalar};
    row.template prepare<1>(z, j, j == row.label ? 0 : -1, state);
    row.push(z, state);
  }
  return state;
}

// Whether another class of the slice comes before the label in torch.argmax.
template <typename T, typename Acc>
__device__ __forceinline__ bool beats_label(const Slice<T>& slice, const T* staged, Acc scalar, Acc x_label,
                                            int64_t label) {
  constexpr int kWidth = RowSpan<T>::kWidth;
  const int thread = static_cast<int>(threadIdx.x);
  bool beaten = false;
  const auto compare = [&](Acc x, int64_t j) { beaten |= x > x_label || (x == x_label && j < label); };
  for (int v = thread; v < slice.count; v += static_cast<int>(blockDim.x)) {
    for (int i = 0; i < kWidth; ++i) compare(Element<T>::widen(staged[v * kWidth + i]), slice.index(v) + i);
  }
  if (thread < slice.scalars) compare(scalar, slice.span.scalar_index(thread));
  return beaten;
}

template <typename T, bool kGeneral, typename Acc>
__device__ __forceinline__ void write_slice(const Slice<T>& slice, const T* staged, Acc scalar, T* out, int64_t label,
                                            const RowGrad<Acc>& grad, const CrossEntropyInputs& inputs) {
  constexpr int kWidth = RowSpan<T>::kWidth;
  const Transform<Acc> transform(inputs.options);
  const Acc* const weight = static_cast<const Acc*>(inputs.weight);
  const bool smoothing = inputs.options.label_smoothing > 0;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll(kGeneral ? 1 : 2)
  for (int v = thread; v < slice.count; v += static_cast<int>(blockDim.x)) {
    const int64_t j = slice.index(v);
    Acc part[kWidth];
    Element<T>::unpack(load_vector(staged + v * kWidth), part);
    gradient<T, kGeneral, kWidth>(part, j, slice.span.label_position(label, j), grad, transform, weight, smoothing);
    stream_vector(out + j, Element<T>::pack(part));
  }
  if (thread < slice.scalars) {
    const int64_t j = slice.span.scalar_index(thread);
    Acc part[1] = {scalar};
    gradient<T, kGeneral, 1>(part, j, j == label ? 0 : -1, grad, transform, weight, smoothing);
    out[j] = Element<T>::narrow(part[0]);
  }
}

template <typename T>
__device__ __forceinline__ void write_zero_slice(const Slice<T>& slice, T* out) {
  using Acc = typename Element<T>::Acc;
  constexpr Acc kZeros[RowSpan<T>::kWidth] = {};
  const int thread = static_cast<int>(threadIdx.x);
  for (int v = thread; v < slice.count; v += static_cast<int>(blockDim.x)) {
    stream_vector(out + slice.index(v), Element<T>::pack(kZeros));
  }
  if (thread < slice.scalars) out[slice.span.scalar_index(thread)] = Element<T>::narrow(Acc(0));
}

__device__ __forceinline__ void barrier_of(int blocks) {
  if (blocks == 1) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
}

// The ring of a block, filled by its first thread: for rows with a label, in the order of the rows.
template <typename T>
struct Ring {
  Mbarrier* full;
  unsigned char* memory;
  StagedShape shape;
  int rank, blocks;
  Walk next;   // row to look at
  int copied;  // rows

  __device__ __forceinline__ T* stage(int item) const {
    return reinterpret_cast<T*>(memory + static_cast<size_t>(item % shape.stages) * shape.stage_bytes);
  }

  // Starts copies until every stage is in use; those of the first `consumed` rows are free.
  __device__ __forceinline__ void refill(const CrossEntropyInputs& inputs, int consumed) {
    bulk_load_fence();
    const int64_t rows = row_count(inputs.logits);
    for (; copied < consumed + shape.stages && next.row < rows; next.advance()) {
      if (!is_item(inputs, row_label(inputs, next.at))) continue;
      const T* const x = row_start<T>(inputs.logits, next.at);
      const Slice<T> slice(x, inputs.logits.V, rank, blocks);
      const unsigned bytes = static_cast<unsigned>(slice.count) * kVectorBytes;
      Mbarrier* const barrier = full + copied % shape.stages;
      mbarrier_expect(barrier, bytes);
      if (bytes > 0) bulk_load(stage(copied), x + slice.index(0), bytes, barrier);
      ++copied;
    }
  }
};

template <typename T, bool kGeneral, bool kGrad>
__global__ void __launch_bounds__(kMaxThreads, 1)
    staged_kernel(const __grid_constant__ ForwardArgs<typename Element<T>::Acc> args, const StagedShape shape) {
  using Acc = typename Element<T>::Acc;
  const CrossEntropyInputs& inputs = args.inputs;
  const LossOptions& options = inputs.options;
  const int64_t V = inputs.logits.V;
  const int64_t rows = row_count(inputs.logits);
  const int rank = cluster_rank(), blocks = cluster_size();
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool first = threadIdx.x == 0;
  auto& shared = *reinterpret_cast<StagedShared<Acc>*>(dynamic_shared());
  static_assert(sizeof(shared) <= kStagedHeader, "plan.h keeps too little for it");
  const Transform<Acc> transform(options);

  if (first) {
    for (int s = 0; s < shape.stages; ++s) mbarrier_init(&shared.full[s], 1);
    mbarrier_init_fence();
  }
  barrier_of(blocks);  // from here on every block of the cluster has started
  Walk walk(inputs.logits, blockIdx.x / blocks, gridDim.x / blocks);
  Ring<T> ring = {shared.full, dynamic_shared() + kStagedHeader, shape, rank, blocks, walk, 0};
  if (first) ring.refill(inputs, 0);

  // The label of the row after the next, and the elements of the next row, are read a row early: their latency passes
  // during this row, and its gradient is not yet written over them.
  Walk ahead = walk;
  const auto label_ahead = [&] { return ahead.row < rows ? row_label(inputs, ahead.at) : options.ignore_index; };
  int64_t label = label_ahead();
  Peek<T> elements = {};
  if (is_item(inputs, label)) elements = peek<T>(inputs, walk.at, label, rank, blocks);
  ahead.advance();
  int64_t next_label = label_ahead();
  int item = 0;  // rows with a label so far
  for (; walk.row < rows; walk.advance()) {
    const int64_t row = walk.row;
    const int64_t this_label = label;
    const Acc x_label = Element<T>::widen(elements.label);
    const Acc scalar = Element<T>::widen(elements.scalar);
    label = next_label;
    if (is_item(inputs, label)) elements = peek<T>(inputs, ahead.at, label, rank, blocks);
    ahead.advance();
    next_label = label_ahead();

    const Slice<T> slice(row_start<T>(inputs.logits, walk.at), V, rank, blocks);
    T* const out = kGrad ? row_start<T>(args.grad_logits, walk.at) : nullptr;
    if (!is_item(inputs, this_label)) {
      const bool ignored = this_label == options.ignore_index;
      const double value = ignored ? 0.0 : kNaN;
      if (first && rank == 0) {
        args.partials[row] = ignored ? Partial{} : Partial{value, 0, options.metrics ? value : 0.0, 1, 0};
        if (!ignored) *args.bad_label = BadLabel{row + 1, this_label};
        if (!kGrad) {
          args.lse[row] = value;
          args.nll[row] = static_cast<Acc>(value);
        }
      }
      if (kGrad) write_zero_slice(slice, out);
      continue;
    }

    const T* const staged = ring.stage(item);
    mbarrier_wait(&shared.full[item % shape.stages], (item / shape.stages) & 1);
    const Acc z_label = kGeneral ? transform.value(x_label) : x_label;
    const RowView<Acc, kGeneral> view(inputs, this_label, z_label);
    RowState<Acc> state = warp_merge<kGeneral>(reduce_slice<T, kGeneral>(slice, staged, scalar, view));
    RowState<Acc>* const states = shared.states[item % 2];
    if (lane < blocks) cluster_store(&states[rank * warps + threadIdx.x / kWarp], lane, state);
    // It also orders what was peeked of this row and the next before any block writes this row's gradient over it.
    barrier_of(blocks);
    state = RowState<Acc>();
    for (int i = lane; i < blocks * warps; i += kWarp) state.merge_about_max(states[i]);
    state = warp_merge<kGeneral>(state);

    bool wins = z_label > state.max;
    if (kGeneral && options.metrics && z_label == state.max) {  // the same decision in every thread of the cluster
      const bool beaten = __syncthreads_or(beats_label(slice, staged, scalar, x_label, this_label));
      if (first) cluster_store(&shared.beaten[rank], 0, static_cast<int>(beaten));
      barrier_of(blocks);
      wins = true;
      for (int block = 0; block < blocks && rank == 0; ++block) wins &= shared.beaten[block] == 0;
    }
    // All threads have left the row before, and in forward this row's stage too.
    if (first) ring.refill(inputs, kGrad ? item : item + 1);

    if (first) {
      const RowWeights weights = RowWeights::read(inputs, this_label, Acc());
      const RowResult result = finish_row(state, z_label, weights, inputs);
      if (rank == 0) {
        const int64_t correct = options.metrics && wins && result.loss == result.loss ? 1 : 0;
        args.partials[row] = Partial{result.loss, weights.target, result.entropy, 1, correct};
        if (!kGrad) {
          args.lse[row] = result.lse;
          args.nll[row] = static_cast<Acc>(result.nll);
        }
      }
      if (kGrad) {
        shared.grad =
            make_grad<Element<T>::kExactExponent>(result.lse, result.nll, weights, *args.grad_loss_sum, inputs);
      }
    }
    if (kGrad) {
      __syncthreads();
      const RowGrad<Acc> grad = shared.grad;
      write_slice<T, kGeneral>(slice, staged, scalar, out, this_label, grad, inputs);
    }
    ++item;
  }
}

}  // namespace accumloss::cuda
