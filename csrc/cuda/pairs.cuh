// Rows of two tensors side by side, a block a row: divergences of a student from a teacher, and cross-entropies against
// class probabilities. The first visit finds lse, the second adds up what depends on it: a sum of differences of
// log-probabilities, which loses no digits where the two rows are nearly the same. A gradient takes one visit.
//
// The type of the elements is known at run time: a load asks for it once in a piece, and there are two kernels
// of each kind, for float and for double. Formulas: row.h, cpu/rows/pair.h.
#pragma once

#include "arguments.cuh"
#include "bad_labels.h"
#include "finish.cuh"
#include "general.cuh"
#include "group.cuh"

namespace accumloss::cuda {

// Neighbours that a thread takes at once.
template <typename Acc>
constexpr int kPiece = sizeof(Acc) == 8 ? 2 : 8;

// How the threads of a block share a row: pieces of kPiece, and before them what comes before 16 bytes of `first`.
template <typename Acc>
struct Pieces {
  int64_t V, head;

  __device__ __forceinline__ Pieces(const void* first, int64_t size, int64_t classes) : V(classes) {
    const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(first) % kVectorBytes);
    head = (kVectorBytes - offset) % kVectorBytes / size;
    if (head > V) head = V;
  }
  __device__ __forceinline__ int64_t count() const {
    return (head > 0 ? 1 : 0) + (V - head + kPiece<Acc> - 1) / kPiece<Acc>;
  }
  __device__ __forceinline__ int64_t begin(int64_t piece) const {
    if (head == 0) return piece * kPiece<Acc>;
    return piece == 0 ? 0 : head + (piece - 1) * kPiece<Acc>;
  }
  __device__ __forceinline__ int length(int64_t piece) const {
    const int64_t left = (head > 0 && piece == 0 ? head : V) - begin(piece);
    return left < kPiece<Acc> ? static_cast<int>(left) : kPiece<Acc>;
  }
};

template <typename T, typename Acc>
__device__ __forceinline__ void load_piece(const T* x, int length, Acc nothing, Acc (&z)[kPiece<Acc>]) {
  constexpr int kWidth = RowSpan<T>::kWidth;
  if (length == kPiece<Acc> && reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0) {
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; i += kWidth) {
      Acc part[kWidth];
      Element<T>::unpack(load_vector(x + i), part);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) z[i + k] = part[k];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece<Acc>; ++i) z[i] = i < length ? Element<T>::widen(x[i]) : nothing;
}

template <typename T, typename Acc>
__device__ __forceinline__ void store_piece(T* x, int length, const Acc (&z)[kPiece<Acc>]) {
  constexpr int kWidth = RowSpan<T>::kWidth;
  if (length == kPiece<Acc> && reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0) {
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; i += kWidth) {
      Acc part[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) part[k] = z[i + k];
      stream_vector(x + i, Element<T>::pack(part));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece<Acc>; ++i) {
    if (i < length) x[i] = Element<T>::narrow(z[i]);
  }
}

// Calls visit with an element of a view's type.
template <typename Acc, typename Visit>
__device__ __forceinline__ void with_element(Dtype dtype, const Visit& visit) {
  if constexpr (sizeof(Acc) == 8) {
    visit(double());
  } else if (dtype == Dtype::kBFloat16) {
    visit(__nv_bfloat16());
  } else if (dtype == Dtype::kFloat16) {
    visit(__half());
  } else {
    visit(float());
  }
}

// A row of a view. What lies past its end is `nothing` to load().
template <typename Acc>
struct AnyRow {
  char* data;
  Dtype dtype;

  __device__ __forceinline__ AnyRow(const LogitsView& view, int64_t row)
      : data(static_cast<char*>(view.data) + row_offset(view, row_at(view, row)) * element_size(view.dtype)),
        dtype(view.dtype) {}
  __device__ __forceinline__ static int64_t element_size(Dtype dtype) {
    return sizeof(Acc) == 8 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  }
  __device__ __forceinline__ Pieces<Acc> pieces(int64_t V) const { return Pieces<Acc>(data, element_size(dtype), V); }
  __device__ __forceinline__ void load(int64_t j, int length, Acc nothing, Acc (&z)[kPiece<Acc>]) const {
    with_element<Acc>(dtype, [&](auto element) {
      load_piece(reinterpret_cast<const decltype(element)*>(data) + j, length, nothing, z);
    });
  }
  // z of logits, which is -inf past the end of the row.
  __device__ __forceinline__ void load_z(int64_t j, int length, const Transform<Acc>& transform,
                                         Acc (&z)[kPiece<Acc>]) const {
    load(j, length, Acc(0), z);
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; ++i) z[i] = i < length ? transform.value(z[i]) : static_cast<Acc>(-kInfinity);
  }
  __device__ __forceinline__ Acc at(int64_t j) const {
    Acc z = 0;
    with_element<Acc>(dtype, [&](auto element) {
      using T = decltype(element);
      z = Element<T>::widen(reinterpret_cast<const T*>(data)[j]);
    });
    return z;
  }
  __device__ __forceinline__ void store(int64_t j, int length, const Acc (&z)[kPiece<Acc>]) const {
    with_element<Acc>(dtype,
                      [&](auto element) { store_piece(reinterpret_cast<decltype(element)*>(data) + j, length, z); });
  }
};

// visit(first class, how many) for the pieces of the calling thread.
template <typename Acc, typename Visit>
__device__ __forceinline__ void for_each_piece(const BlockGroup& group, const Pieces<Acc>& pieces, const Visit& visit) {
  const int64_t count = pieces.count();
#pragma unroll 1
  for (int64_t piece = group.rank(); piece < count; piece += group.size()) {
    visit(pieces.begin(piece), pieces.length(piece));
  }
}

template <typename Acc>
__device__ __forceinline__ void write_zero_row(const BlockGroup& group, const AnyRow<Acc>& out, int64_t V) {
  for_each_piece(group, out.pieces(V), [&](int64_t j, int length) {
    const Acc zeros[kPiece<Acc>] = {};
    out.store(j, length, zeros);
  });
}

// Numbers that one thread finds and all need.
__device__ __forceinline__ double* told() { return reinterpret_cast<double*>(dynamic_shared() + kBlockHeader); }
constexpr int kTold = 4;
constexpr int64_t kPairShared = kBlockHeader + kTold * static_cast<int64_t>(sizeof(double));

// log p_j = z_j - lse, lse in two pieces.
template <typename Acc>
struct LogProbs {
  Acc high, low;

  __device__ __forceinline__ explicit LogProbs(double lse)
      : high(static_cast<Acc>(lse)), low(static_cast<Acc>(static_cast<double>(high) - lse)) {}
  __device__ __forceinline__ Acc operator()(Acc z) const { return (z - high) + low; }
  __device__ __forceinline__ void load(const AnyRow<Acc>& row, int64_t j, int length, const Transform<Acc>& transform,
                                       Acc (&log_p)[kPiece<Acc>]) const {
    row.load_z(j, length, transform, log_p);
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; ++i) log_p[i] = (*this)(log_p[i]);
  }
};

// log s - log m and log t - log m for m = (1 - beta) s + beta t, from both and their logarithms; anything where both
// are 0. The larger of the two is taken out of the mixture, so that no difference loses digits.
template <typename Acc>
struct FromMixture {
  Acc student, teacher;

  __device__ __forceinline__ FromMixture(Acc log_s, Acc log_t, Acc beta) {
    using std::expm1;
    using std::log1p;
    const Acc u = log_t - log_s;
    const bool teacher_leads = u > 0;
    const Acc v = teacher_leads ? u : -u;
    const Acc l = log1p((teacher_leads ? Acc(1) - beta : beta) * expm1(-v));  // log m - the larger
    const Acc rest = -(v + l);
    student = teacher_leads ? rest : -l;
    teacher = teacher_leads ? -l : rest;
  }
};

template <typename Acc>
struct DistillationArgs {
  DistillationInputs inputs;
  DistillationRows rows;
  const double* grad_loss;  // (B, T); backward only
  LogitsView grad_logits;
  Transform<Acc> transform;
  Acc beta;
  BadLabel* bad_label;  // host memory

  DistillationArgs(const DistillationInputs& of, const DistillationRows& to, const double* grad, const LogitsView& out,
                   BadLabel* bad)
      : inputs(of),
        rows(to),
        grad_loss(grad),
        grad_logits(out),
        transform(of.student.options),
        beta(static_cast<Acc>(of.beta)),
        bad_label(bad) {}
};

// lse of a row as one thread makes it, NaN where it is no distribution.
template <typename Acc>
__device__ __forceinline__ double lse_of(const RowState<Acc>& state) {
  const double max = state.max;
  return max - max == 0 ? max + log(static_cast<double>(state.sum)) : kNaN;
}

template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, 1)
    distillation_kernel(const __grid_constant__ DistillationArgs<Acc> args) {
  const CrossEntropyInputs& inputs = args.inputs.student;
  const int64_t V = inputs.logits.V, row = blockIdx.x;
  BlockGroup group;
  const bool first = group.rank() == 0;
  const int64_t label = row_label(inputs, row_at(inputs.logits, row));
  const DistillationRows& to = args.rows;
  const auto write = [&](double loss, double lse, double teacher_lse, double of_student, double of_teacher) {
    static_cast<Acc*>(to.loss)[row] = static_cast<Acc>(loss);
    to.lse[row] = lse, to.teacher_lse[row] = teacher_lse;
    to.of_student[row] = of_student, to.of_teacher[row] = of_teacher;
  };
  if (!is_item(inputs, label)) {
    if (!first) return;
    const bool ignored = label == inputs.options.ignore_index;
    const double value = ignored ? 0.0 : kNaN;
    write(value, value, value, value, value);
    if (!ignored) *args.bad_label = BadLabel{row + 1, label};
    return;
  }
  const AnyRow<Acc> student(inputs.logits, row), teacher(args.inputs.teacher, row);
  const Pieces<Acc> pieces = student.pieces(V);

  const RowView<Acc> view(args.transform);
  RowState<Acc> of_s, of_t;
  for_each_piece(group, pieces, [&](int64_t j, int length) {
    Acc z[kPiece<Acc>];
    student.load_z(j, length, args.transform, z);
    view.push(z, of_s);
    teacher.load_z(j, length, args.transform, z);
    view.push(z, of_t);
  });
  of_s = group.merge<false>(of_s);
  of_t = group.merge<false>(of_t);
  if (first) {
    told()[0] = lse_of(of_s);
    told()[1] = lse_of(of_t);
  }
  __syncthreads();
  const double lse = told()[0], teacher_lse = told()[1];
  const LogProbs<Acc> log_s_of(lse), log_t_of(teacher_lse);
  const Acc beta = args.beta;

  Acc of_student = 0, of_teacher = 0;
  for_each_piece(group, pieces, [&](int64_t j, int length) {
    using std::exp;
    Acc log_s[kPiece<Acc>], log_t[kPiece<Acc>];
    log_s_of.load(student, j, length, args.transform, log_s);
    log_t_of.load(teacher, j, length, args.transform, log_t);
    // A class of probability 0 adds nothing, whatever its logarithm.
    if (beta == 0) {
#pragma unroll
      for (int i = 0; i < kPiece<Acc>; ++i) {
        const Acc t = exp(log_t[i]);
        if (t != 0) of_teacher += t * (log_t[i] - log_s[i]);
      }
    } else if (beta == 1) {
#pragma unroll
      for (int i = 0; i < kPiece<Acc>; ++i) {
        const Acc s = exp(log_s[i]);
        if (s != 0) of_student += s * (log_s[i] - log_t[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPiece<Acc>; ++i) {
        const Acc s = exp(log_s[i]), t = exp(log_t[i]);
        const FromMixture<Acc> from_m(log_s[i], log_t[i], beta);
        if (s != 0) of_student += s * from_m.student;
        if (t != 0) of_teacher += t * from_m.teacher;
      }
    }
  });
  const double student_sum = group.sum<Acc>(of_student), teacher_sum = group.sum<Acc>(of_teacher);
  if (!first) return;
  const double share = args.inputs.beta;
  const double loss = share == 0   ? teacher_sum
                      : share == 1 ? student_sum
                                   : share * teacher_sum + (1 - share) * student_sum;
  write(loss, lse, teacher_lse, student_sum, teacher_sum);
}

// g_j = factor * dD/dz_s: s_j (log s_j - log m_j - KL(s | m)) times (1 - beta); beta 0: s_j - t_j
template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, 1)
    distillation_backward_kernel(const __grid_constant__ DistillationArgs<Acc> args) {
  const CrossEntropyInputs& inputs = args.inputs.student;
  const int64_t V = inputs.logits.V, row = blockIdx.x;
  const BlockGroup group;
  const AnyRow<Acc> out(args.grad_logits, row);
  const double grad = args.grad_loss[row];
  if (!is_item(inputs, row_label(inputs, row_at(inputs.logits, row))) || grad == 0)
    return write_zero_row(group, out, V);
  const AnyRow<Acc> student(inputs.logits, row), teacher(args.inputs.teacher, row);
  const Acc beta = args.beta;
  const LogProbs<Acc> log_s_of(args.rows.lse[row]), log_t_of(args.rows.teacher_lse[row]);
  const Acc divergence = static_cast<Acc>(args.rows.of_student[row]);
  const Acc share = beta == 0 || beta == 1 ? Acc(1) : Acc(1) - beta;
  const Acc factor = static_cast<Acc>(grad) * share * args.transform.logit_scale;
  for_each_piece(group, student.pieces(V), [&](int64_t j, int length) {
    using std::exp;
    Acc log_s[kPiece<Acc>], log_t[kPiece<Acc>];
    log_s_of.load(student, j, length, args.transform, log_s);
    log_t_of.load(teacher, j, length, args.transform, log_t);
    if (beta == 0) {
#pragma unroll
      for (int i = 0; i < kPiece<Acc>; ++i) log_s[i] = factor * (exp(log_s[i]) - exp(log_t[i]));
    } else if (beta == 1) {
#pragma unroll
      for (int i = 0; i < kPiece<Acc>; ++i) {
        const Acc s = exp(log_s[i]);
        log_s[i] = s == 0 ? Acc(0) : factor * (s * (log_s[i] - log_t[i] - divergence));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPiece<Acc>; ++i) {
        const Acc s = exp(log_s[i]);
        const FromMixture<Acc> from_m(log_s[i], log_t[i], beta);
        log_s[i] = s == 0 ? Acc(0) : factor * (s * (from_m.student - divergence));
      }
    }
    out.store(j, length, log_s);
  });
}

template <typename Acc>
struct TargetArgs {
  TargetInputs inputs;
  TargetRows rows;
  const double* grad_loss;  // (B, T); backward only
  LogitsView grad_logits;
  Transform<Acc> transform;
  FactorOptions<Acc> factor;

  TargetArgs(const TargetInputs& of, const TargetRows& to, const double* grad, const LogitsView& out)
      : inputs(of), rows(to), grad_loss(grad), grad_logits(out), transform(of.logits.options), factor(of.logits) {}
};

// w_j q_j of a piece, q_j = (1 - label_smoothing) target + label_smoothing / V; 0 past the end of the row.
template <typename Acc>
__device__ __forceinline__ void load_targets(const TargetArgs<Acc>& args, const AnyRow<Acc>& targets, int64_t j,
                                             int length, Acc (&q)[kPiece<Acc>]) {
  const Acc* const weight = static_cast<const Acc*>(args.inputs.logits.weight);
  targets.load(j, length, Acc(0), q);
#pragma unroll
  for (int i = 0; i < kPiece<Acc>; ++i) {
    if (i >= length) continue;
    if (args.factor.share > 0) q[i] = q[i] * args.factor.hard + args.factor.share;
    if (weight != nullptr) q[i] *= weight[j + i];
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, 1) targets_kernel(const __grid_constant__ TargetArgs<Acc> args) {
  const CrossEntropyInputs& inputs = args.inputs.logits;
  const LossOptions& options = inputs.options;
  const int64_t V = inputs.logits.V, row = blockIdx.x;
  BlockGroup group;
  const bool first = group.rank() == 0;
  const AnyRow<Acc> logits(inputs.logits, row), targets(args.inputs.targets, row);
  const Pieces<Acc> pieces = logits.pieces(V);
  const Acc lowest = static_cast<Acc>(-kInfinity);

  // The class of the largest target takes the label's part: what it has of the loss would be lost in lse - z.
  LargestAt<Acc> largest;
  for_each_piece(group, targets.pieces(V), [&](int64_t j, int length) {
    Acc q[kPiece<Acc>];
    targets.load(j, length, lowest, q);
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; ++i) {
      if (i < length) largest.push(q[i], j + i);
    }
  });
  const int64_t label = largest.first(group);

  const RowView<Acc> view(args.transform);
  RowState<Acc> state;
  for_each_piece(group, pieces, [&](int64_t j, int length) {
    Acc z[kPiece<Acc>];
    logits.load_z(j, length, args.transform, z);
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; ++i) z[i] = j + i == label ? lowest : z[i];
    view.push(z, state);
  });
  state = group.merge<false>(state);
  if (first) {
    LossOptions of_row = options;  // of lse and nll alone
    of_row.label_smoothing = 0;
    of_row.metrics = false;
    const double z_label = args.transform.value(logits.at(label));
    const RowResult result = row_result(exact_state(state, z_label), z_label, 1.0, 0.0, V, of_row);
    told()[0] = result.lse;
    told()[1] = result.nll;
  }
  __syncthreads();
  const double lse = told()[0], nll = told()[1];
  const LogProbs<Acc> log_p_of(lse);

  Acc surprise = 0, total = 0, of_label = 0;
  for_each_piece(group, pieces, [&](int64_t j, int length) {
    Acc z[kPiece<Acc>], q[kPiece<Acc>];
    logits.load_z(j, length, args.transform, z);
    load_targets(args, targets, j, length, q);
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; ++i) {
      if (j + i == label) {
        of_label = q[i];
        q[i] = 0;
      }
      total += q[i];
      if (q[i] != 0) surprise -= q[i] * log_p_of(z[i]);
    }
  });
  const double surprise_sum = group.sum<Acc>(surprise), own = group.sum<Acc>(of_label);
  const double total_sum = group.sum<Acc>(total) + own;
  if (!first) return;
  double loss = surprise_sum + (own == 0 ? 0.0 : own * nll);
  if (options.z_loss > 0) loss += options.z_loss * lse * lse;
  const TargetRows& to = args.rows;
  static_cast<Acc*>(to.loss)[row] = static_cast<Acc>(nll != nll ? kNaN : loss);
  static_cast<Acc*>(to.nll)[row] = static_cast<Acc>(nll);
  to.lse[row] = lse, to.total[row] = total_sum, to.of_label[row] = own, to.label[row] = label;
}

// g_j = grad * (C p_j - w_j q_j) times the slope, C = total + 2 z_loss lse; the label's from nll
template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, 1)
    targets_backward_kernel(const __grid_constant__ TargetArgs<Acc> args) {
  using std::exp;
  using std::expm1;
  const LogitsView& view = args.inputs.logits.logits;
  const TargetRows& found = args.rows;
  const int64_t V = view.V, row = blockIdx.x;
  const BlockGroup group;
  const AnyRow<Acc> out(args.grad_logits, row);
  const double grad = args.grad_loss[row];
  if (grad == 0) return write_zero_row(group, out, V);
  const AnyRow<Acc> logits(view, row), targets(args.inputs.targets, row);
  const LogProbs<Acc> log_p_of(found.lse[row]);
  const int64_t label = found.label[row];
  const double total = found.total[row], of_lse = static_cast<double>(args.factor.z_loss) * found.lse[row];
  const Acc factor = static_cast<Acc>(grad), probability = static_cast<Acc>(total + of_lse);
  const Acc nll = static_cast<const Acc*>(found.nll)[row];
  const Acc of_label = static_cast<Acc>(total) * expm1(-nll) + static_cast<Acc>(total - found.of_label[row]) +
                       static_cast<Acc>(of_lse) * exp(-nll);
  for_each_piece(group, logits.pieces(V), [&](int64_t j, int length) {
    Acc x[kPiece<Acc>], q[kPiece<Acc>];
    logits.load(j, length, static_cast<Acc>(-kInfinity), x);
    load_targets(args, targets, j, length, q);
#pragma unroll
    for (int i = 0; i < kPiece<Acc>; ++i) {
      const Acc p = exp(log_p_of(args.transform.value(x[i])));
      const Acc dz = j + i == label ? of_label : probability * p - q[i];
      x[i] = factor * dz * args.transform.slope(x[i]);
    }
    out.store(j, length, x);
  });
}

}  // namespace accumloss::cuda
