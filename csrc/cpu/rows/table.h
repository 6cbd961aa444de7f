// The table of row kernels that table.cpp fills once for each instruction set.
#pragma once

#include "../../backend.h"
#include "../../row.h"

namespace accumloss {
namespace cpu {

// Elements that one step widens, transforms and exponentiates while they are in the first-level cache.
constexpr int64_t kBlock = 512;
constexpr int kLanes = 32;  // partial sums, each of every 32nd class

// Rows of at most kMedium classes are processed kGroup at a time where no option but a weight is set; those of at most
// kShort one to a lane.
constexpr int64_t kShort = 10;
constexpr int64_t kMedium = 512;
constexpr int64_t kGroup = 32;

// How far ahead of the loads logits are fetched.
constexpr int64_t kPrefetchBytes = 8192;

// Of rows without options the sums of a shard have the blocks of the whole row, at most so many classes each.
constexpr int64_t kAligned = 2 * kBlock;

constexpr int64_t num_blocks(int64_t V) { return (V + kBlock - 1) / kBlock; }

// Whether a logit passes through no transform and is not smoothed: rows then take a shorter way.
ACCUMLOSS_HD bool is_plain(const LossOptions& options) {
  return options.softcap == 0 && options.logit_scale == 1 && options.label_smoothing == 0;
}

// The classes [begin, end) of one row. All kernels take it, so that a row may be split over threads at multiples of
// kBlock. x, weight, exps and references point at class 0 of the row.
struct RowSegment {
  const void* x;       // (V,) logits
  const void* weight;  // (V,) Acc class weights, or null
  int64_t begin, end;
  int64_t target;    // y, anywhere; outside of [0, V) where the logits are a shard and another one has the label
  double reference;  // row_reference(z_y); there, of any class
  // Who reads the logits of a class fetches what lies so many bytes ahead: before turn, a multiple of kLanes, and from
  // there on.
  int64_t turn = 0, ahead_before = kPrefetchBytes, ahead_after = kPrefetchBytes;

  int64_t ahead(int64_t j) const { return j < turn ? ahead_before : ahead_after; }
};

// Up to kGroup short rows, consecutive in memory.
struct ShortRows {
  const void* x;        // (count, V) logits, V <= kMedium
  const float* weight;  // (V,) class weights, or null
  int64_t V, count, ignore_index;
  bool has_next;                       // whether as many rows follow, and the same thread is going to visit them
  double grad;                         // of the sum of the losses
  alignas(64) int64_t labels[kGroup];  // in [0, V) or ignore_index
  // results, 0 where a row is ignored
  alignas(64) double nll[kGroup], lse[kGroup];
  double loss_sum, weight_sum, entropy_sum;
  int64_t num_items, num_correct;
};

// A row of a student's logits beside the teacher's. log p_j = z_j - lse.
struct PairRow {
  const void* x;      // (V,) student's logits
  const void* other;  // (V,) teacher's
  int64_t V;
  double lse, other_lse;
  double beta;            // share of the teacher in the mixture
  double divergence = 0;  // KL(student | mixture), of the gradient
};

// A row of logits beside class probabilities. label: the class whose entry is finished from nll = lse - z_label.
struct TargetRow {
  const void* x;        // (V,) logits
  const void* targets;  // (V,)
  const void* weight;   // (V,) Acc class weights, or null
  int64_t V, label;
  double lse, nll;
  double total = 0, of_label = 0;  // sum_j w_j q_j and the label's, of the gradient
};

// What a row and a teacher's come to beside each other: its logits, or probabilities as they are.
struct PairSums {
  RowState<double> student, teacher;  // max and sum; of the student without the label, of a teacher that has logits
  int64_t label;                      // the first of the largest probabilities, -1 of logits
  double total;                       // sum_j w_j without the label's
  // sum_j w_j ((t_j - teacher.max) - (z_j - student.max)), w_j = exp(t_j - teacher.max); of probabilities
  // sum_j w_j (student.max - z_j), of -inf 0 in the place of the maximum
  double weighted;
};

struct RowKernels {
  // z(x[0]), by the very code that transforms a whole row
  double (*transform_one)(const void* x, const LossOptions& options);
  // Sets state to the classes of the segment other than the target. Where exps is not null, it receives
  // exp(z_j - r) (num_blocks(V) * kBlock, of Acc) and references (num_blocks(V), of Acc) the r of each block. exps may
  // be x where is_plain() and the logits are of Acc: then it is (V,).
  void (*push)(const RowSegment& row, const LossOptions& options, RowState<double>* state, void* exps,
               void* references);
  // Writes dL/dx of the segment to grad, which may be x. Where streams, past the caches, and grad is not x.
  void (*write_grad)(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient, bool streams,
                     void* grad);
  // The same from the exponentials that push left behind, which may lie where the gradient goes. Not for the entropy's.
  void (*write_grad_from_exps)(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient,
                               const void* exps, const void* references, bool streams, void* grad);
  // whether x[target] is the first of the largest logits (torch.argmax); asked only where the label ties
  bool (*label_is_argmax)(const void* x, int64_t V, int64_t target);
  // max_j x[j]
  double (*max_logit)(const void* x, int64_t V);
  // The first j >= begin where x[j] < value does not hold, so that NaN is found; V where there is none.
  int64_t (*first_not_below)(const void* x, int64_t begin, int64_t V, double value);
  // The sums over a row of a student's logits beside a teacher's, both times scale. One read of either.
  void (*push_pair)(const void* x, const void* teacher, int64_t V, double scale, PairSums* found);
  // sum_j s_j (log s_j - log m_j) and sum_j t_j (log t_j - log m_j), m = (1 - beta) s + beta t, of a beta in (0, 1)
  void (*push_divergence)(const PairRow& row, const LossOptions& options, double* of_student, double* of_teacher);
  // Writes factor * d/dx of beta times the one and 1 - beta times the other, student's logits x; grad may be x.
  void (*write_divergence_grad)(const PairRow& row, const LossOptions& options, double factor, bool streams,
                                void* grad);
  // The sums over a row of logits beside class probabilities, where is_plain() and there are no class weights. One read
  // of either.
  void (*push_plain_targets)(const void* x, const void* targets, int64_t V, PairSums* found);
  // sum_j w_j q_j (lse - z_j) without the label's, the sum of all w_j q_j, and the label's
  void (*push_targets)(const TargetRow& row, const LossOptions& options, double* surprise, double* total,
                       double* of_label);
  void (*write_targets_grad)(const TargetRow& row, const LossOptions& options, double factor, bool streams, void* grad);
  // The results of a group, and where grad (count, V) is not null its gradient; grad may be x. Null for double.
  void (*short_rows)(ShortRows& rows, bool metrics, void* grad);
  // values *= factor
  void (*scale)(void* values, int64_t n, double factor);
};

struct InstructionSet {
  const char* name;
  RowKernels kernels[4];  // by Dtype
};

const InstructionSet& portable();
#if defined(ACCUMLOSS_X86_ISAS)
const InstructionSet& avx2();
const InstructionSet& avx512();
#endif

}  // namespace cpu
}  // namespace accumloss
