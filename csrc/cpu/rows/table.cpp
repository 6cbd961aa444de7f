// The row kernels of one instruction set, which ACCUMLOSS_ISA names. One read of the logits gives the RowState, a
// second pass over the row (or over its exponentials, kept in a scratch row) the gradient.
#include "table.h"

#include "general.h"
#include "pair.h"
#include "plain.h"
#include "short.h"

namespace accumloss {
namespace cpu {
namespace {

template <typename T>
double transform_one(const void* x, const LossOptions& options) {
  using Acc = typename AccOf<T>::type;
  alignas(64) typename Lanes<T>::Real z = load_one(static_cast<const T*>(x));
  const Transform<Acc> transform(options);
  if (!transform.is_identity()) transform_block(reinterpret_cast<Acc*>(&z), Lanes<T>::kWidth, transform);
  return z[0];
}

template <typename T>
void push(const RowSegment& row, const LossOptions& options, RowState<double>* state, void* exps, void* references) {
  using Acc = typename AccOf<T>::type;
  Acc* e = static_cast<Acc*>(exps);
  Acc* r = static_cast<Acc*>(references);
  if (is_plain(options)) return push_plain<T>(row, options.metrics, state, e, r);
  push_general<T>(row, options, state, e, r);
}

// write(row, grad) with grad at the class row.begin, for the segment as it is or in parts that go past the caches
template <typename T, typename Write>
ACCUMLOSS_INLINE void write_or_stream(const RowSegment& row, bool streams, T* grad, const Write& write) {
  if (!streams) return write(row, grad + row.begin);
  alignas(64) T staged[kStaged];
  RowSegment part = row;
  for (; part.begin < row.end; part.begin = part.end) {
    part.end = row.end - part.begin < kStaged ? row.end : part.begin + kStaged;
    write(part, staged);
    stream(staged, part.end - part.begin, grad + part.begin);
  }
}

template <typename T>
void write_grad(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient, bool streams,
                void* grad) {
  write_or_stream(row, streams, static_cast<T*>(grad), [&](const RowSegment& part, T* to) {
    if (is_plain(options) && gradient.entropy == 0) return write_grad_plain<T>(part, gradient, to);
    write_grad_general<T>(part, options, gradient, to);
  });
}

template <typename T>
void write_grad_from_exps(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient,
                          const void* exps, const void* references, bool streams, void* grad) {
  using Acc = typename AccOf<T>::type;
  const Acc* e = static_cast<const Acc*>(exps);
  const Acc* r = static_cast<const Acc*>(references);
  write_or_stream(row, streams, static_cast<T*>(grad), [&](const RowSegment& part, T* to) {
    if (is_plain(options)) return write_grad_from_exps_plain<T>(part, gradient, e, r, to);
    write_grad_from_exps_general<T>(part, options, gradient, e, r, to);
  });
}

template <typename T>
void scale(void* values, int64_t n, double factor) {
  using Acc = typename AccOf<T>::type;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  T* x = static_cast<T*>(values);
  const Acc f = static_cast<Acc>(factor);
  alignas(64) Acc z[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    load_block(x + begin, count, z);
    for (int64_t i = 0; i < count; i += kWidth) store(load(z + i) * f, z + i);
    store_block(z, count, x + begin);
  }
}

template <typename T>
constexpr RowKernels kernels_of() {
  RowKernels kernels = {};
  kernels.transform_one = transform_one<T>;
  kernels.push = push<T>;
  kernels.write_grad = write_grad<T>;
  kernels.write_grad_from_exps = write_grad_from_exps<T>;
  kernels.label_is_argmax = label_is_argmax<T>;
  kernels.max_logit = max_logit<T>;
  kernels.first_not_below = first_not_below<T>;
  kernels.push_pair = push_pair<T>;
  kernels.push_divergence = push_divergence<T>;
  kernels.write_divergence_grad = write_divergence_grad<T>;
  kernels.push_plain_targets = push_plain_targets<T>;
  kernels.push_targets = push_targets<T>;
  kernels.write_targets_grad = write_targets_grad<T>;
  if constexpr (!std::is_same<T, double>::value) kernels.short_rows = short_rows<T>;
  kernels.scale = scale<T>;
  return kernels;
}

}  // namespace

#define ACCUMLOSS_STRING(name) #name
#define ACCUMLOSS_NAME(name) ACCUMLOSS_STRING(name)

const InstructionSet& ACCUMLOSS_ISA() {
  static constexpr InstructionSet set = {
      ACCUMLOSS_NAME(ACCUMLOSS_ISA),
      {kernels_of<BFloat16>(), kernels_of<Float16>(), kernels_of<float>(), kernels_of<double>()}};
  return set;
}

}  // namespace cpu
}  // namespace accumloss
