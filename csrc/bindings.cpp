// All op schemas and registrations. The only file that names dispatch keys.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops.h"
#if defined(ACCUMLOSS_WITH_CUDA)
#include "cuda/bad_labels.h"
#endif

namespace accumloss {
namespace {

// The options as a schema and as the types of a call have them, each after a comma.
#define AS_SCHEMA(type, schema_type, name, value) ", " #schema_type " " #name "=" #value
#define AS_TYPE(type, schema_type, name, value) , type
#define LM_OPTIONS ACCUMLOSS_LOSS_OPTIONS(AS_SCHEMA)
#define SHARD ", int class_offset, int vocab_size" LM_OPTIONS
#define TOKEN_GRADS "Tensor? grad_loss, Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy"
#define TOKEN_ROWS ", Tensor labels, Tensor nll, Tensor lse, Tensor entropy, Tensor? weight=None, *"
#define OF_SHARD ", int class_offset=0, int vocab_size=0"
#define PAIR "Tensor teacher_logits, Tensor labels"
#define PAIR_ROWS ", Tensor loss, Tensor lse, Tensor teacher_lse, Tensor of_student, Tensor of_teacher"
#define PAIR_OPTIONS ", *, float beta=0.5, float logit_scale=1.0, int ignore_index=-100"
#define TARGET_ROWS "Tensor loss, Tensor nll, Tensor lse, Tensor total, Tensor of_label, Tensor label"
#define TARGET_OPTIONS \
  ", Tensor? weight=None, *, float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0, float logit_scale=1.0"
#define ALL_OPTIONS ", int shift=0" LM_OPTIONS ", bool metrics=False"

STABLE_TORCH_LIBRARY(accumloss, m) {
  m.def("cross_entropy(Tensor logits, Tensor labels, Tensor? weight=None, *" ALL_OPTIONS
        ") -> (Tensor loss_sum, Tensor num_items, Tensor total_weight, Tensor lse, Tensor num_correct, "
        "Tensor entropy_sum, Tensor nll)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss_sum, Tensor logits, Tensor labels, Tensor lse, Tensor nll, "
      "Tensor? weight=None, *" ALL_OPTIONS ") -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor grad_loss_sum, Tensor(a!) logits, Tensor labels, Tensor lse, Tensor nll, "
      "Tensor? weight=None, *" ALL_OPTIONS ") -> ()");
  m.def(
      "cross_entropy_with_grad(Tensor grad_loss_sum, Tensor logits, Tensor labels, Tensor? weight=None, "
      "*" ALL_OPTIONS
      ") -> (Tensor loss_sum, Tensor num_items, Tensor total_weight, Tensor num_correct, Tensor entropy_sum, "
      "Tensor grad_logits)");
  m.def(
      "cross_entropy_with_grad_(Tensor grad_loss_sum, Tensor(a!) logits, Tensor labels, Tensor? weight=None, "
      "*" ALL_OPTIONS
      ") -> (Tensor loss_sum, Tensor num_items, Tensor total_weight, Tensor num_correct, Tensor entropy_sum)");
  m.def(
      "add_cross_entropy_(Tensor(a!) totals, Tensor? grad_loss_sum, Tensor(b!) logits, Tensor labels, "
      "Tensor? weight=None, *" ALL_OPTIONS ") -> ()");
  m.def(
      "mean_with_grad(Tensor divisor, Tensor logits, Tensor labels, Tensor? weight=None, float expected_grad=1.0, *"
      ", int shift=0" LM_OPTIONS ") -> (Tensor loss, Tensor grad_logits)");
  m.def("token_statistics(Tensor logits, Tensor labels, Tensor? weight=None, *" ALL_OPTIONS
        ") -> (Tensor loss, Tensor nll, Tensor lse, Tensor entropy, Tensor argmax)");
  // Also of a shard of the vocabulary, which the last two say.
  m.def("token_statistics_backward(" TOKEN_GRADS ", Tensor logits" TOKEN_ROWS ALL_OPTIONS OF_SHARD ") -> Tensor");
  m.def("token_statistics_backward_(" TOKEN_GRADS ", Tensor(a!) logits" TOKEN_ROWS ALL_OPTIONS OF_SHARD ") -> ()");
  m.def("distillation(Tensor student_logits, " PAIR PAIR_OPTIONS
        ") -> (Tensor loss, Tensor lse, Tensor teacher_lse, Tensor of_student, Tensor of_teacher)");
  m.def("distillation_backward(Tensor grad_loss, Tensor student_logits, " PAIR PAIR_ROWS PAIR_OPTIONS ") -> Tensor");
  m.def("distillation_backward_(Tensor grad_loss, Tensor(a!) student_logits, " PAIR PAIR_ROWS PAIR_OPTIONS ") -> ()");
  m.def("soft_cross_entropy(Tensor logits, Tensor targets" TARGET_OPTIONS ") -> (" TARGET_ROWS ")");
  m.def("soft_cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor targets, " TARGET_ROWS TARGET_OPTIONS
        ") -> Tensor");
  m.def("cross_entropy_shard(Tensor logits, Tensor labels, Tensor? weight=None, *" SHARD
        ", bool metrics=False) -> Tensor");
  m.def(
      "cross_entropy_shard_backward(Tensor grad_loss_sum, Tensor logits, Tensor labels, Tensor lse, Tensor nll, "
      "Tensor? weight=None, *" SHARD ") -> Tensor");
  m.def(
      "cross_entropy_shard_backward_(Tensor grad_loss_sum, Tensor(a!) logits, Tensor labels, Tensor lse, Tensor nll, "
      "Tensor? weight=None, *" SHARD ") -> ()");
  m.def("scale_(Tensor(a!) values, Tensor factor) -> ()");
  m.def("scratch(Tensor like, int rows, int columns) -> Tensor");
  // Both are cross_entropy through the dispatcher, in ops.py: there an error keeps its type and message.
  m.def("causal_lm(Tensor logits, Tensor labels, Tensor? weight=None, *" LM_OPTIONS
        ") -> (Tensor loss_sum, Tensor num_items)");
  m.def("masked_lm(Tensor logits, Tensor labels, Tensor? weight=None, *" LM_OPTIONS
        ") -> (Tensor loss_sum, Tensor num_items)");
}

const Backend& ready_cpu() { return cpu_backend(); }
#if defined(ACCUMLOSS_WITH_CUDA)
const Backend& ready_cuda() {
  check_bad_labels();  // what the kernels of an earlier call met
  return cuda_backend();
}
#endif

using BackendOf = const Backend& (*)();
using OptionalTensor = std::optional<Tensor>;

// The ops as the dispatcher calls them: the options spread out, in the order of the fields of LossOptions.
template <BackendOf backend, typename... Option>
struct Ops {
  static ForwardOutputs forward(Tensor logits, Tensor labels, OptionalTensor weight, Option... option) {
    return cross_entropy(backend(), logits, labels, weight, LossOptions{option...});
  }
  static Tensor backward(Tensor grad_loss_sum, Tensor logits, Tensor labels, Tensor lse, Tensor nll,
                         OptionalTensor weight, Option... option) {
    return cross_entropy_backward(backend(), grad_loss_sum, logits, labels, lse, nll, weight, LossOptions{option...});
  }
  static void backward_(Tensor grad_loss_sum, Tensor logits, Tensor labels, Tensor lse, Tensor nll,
                        OptionalTensor weight, Option... option) {
    cross_entropy_backward_(backend(), grad_loss_sum, logits, labels, lse, nll, weight, LossOptions{option...});
  }
  static WithGradOutputs with_grad(Tensor grad_loss_sum, Tensor logits, Tensor labels, OptionalTensor weight,
                                   Option... option) {
    return cross_entropy_with_grad(backend(), grad_loss_sum, logits, labels, weight, LossOptions{option...});
  }
  static InPlaceOutputs with_grad_(Tensor grad_loss_sum, Tensor logits, Tensor labels, OptionalTensor weight,
                                   Option... option) {
    return cross_entropy_with_grad_(backend(), grad_loss_sum, logits, labels, weight, LossOptions{option...});
  }
  static void add_(Tensor totals, OptionalTensor grad_loss_sum, Tensor logits, Tensor labels, OptionalTensor weight,
                   Option... option) {
    add_cross_entropy_(backend(), totals, grad_loss_sum, logits, labels, weight, LossOptions{option...});
  }
  static std::tuple<Tensor, Tensor> mean_with_grad(Tensor divisor, Tensor logits, Tensor labels, OptionalTensor weight,
                                                   double expected_grad, Option... option) {
    return accumloss::mean_with_grad(backend(), divisor, logits, labels, weight, expected_grad, LossOptions{option...});
  }
  static TokenOutputs tokens(Tensor logits, Tensor labels, OptionalTensor weight, Option... option) {
    return token_statistics(backend(), logits, labels, weight, LossOptions{option...});
  }
  static Tensor tokens_backward(OptionalTensor grad_loss, OptionalTensor grad_nll, OptionalTensor grad_lse,
                                OptionalTensor grad_entropy, Tensor logits, Tensor labels, Tensor nll, Tensor lse,
                                Tensor entropy, OptionalTensor weight, Option... option) {
    return token_statistics_backward(backend(), {grad_loss, grad_nll, grad_lse, grad_entropy}, logits, labels, nll, lse,
                                     entropy, weight, LossOptions{option...});
  }
  static void tokens_backward_(OptionalTensor grad_loss, OptionalTensor grad_nll, OptionalTensor grad_lse,
                               OptionalTensor grad_entropy, Tensor logits, Tensor labels, Tensor nll, Tensor lse,
                               Tensor entropy, OptionalTensor weight, Option... option) {
    token_statistics_backward_(backend(), {grad_loss, grad_nll, grad_lse, grad_entropy}, logits, labels, nll, lse,
                               entropy, weight, LossOptions{option...});
  }
  static void scale(Tensor values, Tensor factor) { scale_(backend(), values, factor); }
  static Tensor scratch(Tensor like, int64_t rows, int64_t columns) {
    return accumloss::scratch(backend(), like, rows, columns);
  }
};

// Those of a shard of the vocabulary, without shift.
template <BackendOf backend, typename... Option>
struct ShardOps {
  static LossOptions options(int64_t class_offset, int64_t vocab_size, Option... option) {
    LossOptions options{0, option...};
    options.class_offset = class_offset;
    options.vocab_size = vocab_size;
    return options;
  }
  static Tensor forward(Tensor logits, Tensor labels, OptionalTensor weight, int64_t class_offset, int64_t vocab_size,
                        Option... option, bool metrics) {
    LossOptions given = options(class_offset, vocab_size, option...);
    given.metrics = metrics;
    return cross_entropy_shard(backend(), logits, labels, weight, given);
  }
  static Tensor backward(Tensor grad_loss_sum, Tensor logits, Tensor labels, Tensor lse, Tensor nll,
                         OptionalTensor weight, int64_t class_offset, int64_t vocab_size, Option... option) {
    return cross_entropy_shard_backward(backend(), grad_loss_sum, logits, labels, lse, nll, weight,
                                        options(class_offset, vocab_size, option...));
  }
  static void backward_(Tensor grad_loss_sum, Tensor logits, Tensor labels, Tensor lse, Tensor nll,
                        OptionalTensor weight, int64_t class_offset, int64_t vocab_size, Option... option) {
    cross_entropy_shard_backward_(backend(), grad_loss_sum, logits, labels, lse, nll, weight,
                                  options(class_offset, vocab_size, option...));
  }
};

// Those of rows of two tensors.
template <BackendOf backend>
struct PairOps {
  static LossOptions options(double logit_scale, int64_t ignore_index) {
    LossOptions options;
    options.logit_scale = logit_scale;
    options.ignore_index = ignore_index;
    return options;
  }
  static DistillationOutputs forward(Tensor student, Tensor teacher, Tensor labels, double beta, double logit_scale,
                                     int64_t ignore_index) {
    return distillation(backend(), student, teacher, labels, beta, options(logit_scale, ignore_index));
  }
  static Tensor backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor labels, Tensor loss, Tensor lse,
                         Tensor teacher_lse, Tensor of_student, Tensor of_teacher, double beta, double logit_scale,
                         int64_t ignore_index) {
    return distillation_backward(backend(), grad_loss, student, teacher, labels,
                                 {loss, lse, teacher_lse, of_student, of_teacher}, beta,
                                 options(logit_scale, ignore_index));
  }
  static void backward_(Tensor grad_loss, Tensor student, Tensor teacher, Tensor labels, Tensor loss, Tensor lse,
                        Tensor teacher_lse, Tensor of_student, Tensor of_teacher, double beta, double logit_scale,
                        int64_t ignore_index) {
    distillation_backward_(backend(), grad_loss, student, teacher, labels,
                           {loss, lse, teacher_lse, of_student, of_teacher}, beta, options(logit_scale, ignore_index));
  }
  static LossOptions of_targets(double label_smoothing, double z_loss, double softcap, double logit_scale) {
    LossOptions options;
    options.label_smoothing = label_smoothing;
    options.z_loss = z_loss;
    options.softcap = softcap;
    options.logit_scale = logit_scale;
    return options;
  }
  static TargetOutputs soft(Tensor logits, Tensor targets, OptionalTensor weight, double label_smoothing, double z_loss,
                            double softcap, double logit_scale) {
    return soft_cross_entropy(backend(), logits, targets, weight,
                              of_targets(label_smoothing, z_loss, softcap, logit_scale));
  }
  static Tensor soft_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor loss, Tensor nll, Tensor lse,
                              Tensor total, Tensor of_label, Tensor label, OptionalTensor weight,
                              double label_smoothing, double z_loss, double softcap, double logit_scale) {
    return soft_cross_entropy_backward(backend(), grad_loss, logits, targets, {loss, nll, lse, total, of_label, label},
                                       weight, of_targets(label_smoothing, z_loss, softcap, logit_scale));
  }
};

template <BackendOf backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  using OpsOfBackend = Ops<backend, int64_t ACCUMLOSS_LOSS_OPTIONS(AS_TYPE), bool>;
  m.impl("cross_entropy", TORCH_BOX(&OpsOfBackend::forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&OpsOfBackend::backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&OpsOfBackend::backward_));
  m.impl("cross_entropy_with_grad", TORCH_BOX(&OpsOfBackend::with_grad));
  m.impl("cross_entropy_with_grad_", TORCH_BOX(&OpsOfBackend::with_grad_));
  m.impl("add_cross_entropy_", TORCH_BOX(&OpsOfBackend::add_));
  m.impl("token_statistics", TORCH_BOX(&OpsOfBackend::tokens));
  using OpsOfEither = Ops<backend, int64_t ACCUMLOSS_LOSS_OPTIONS(AS_TYPE), bool, int64_t, int64_t>;
  m.impl("token_statistics_backward", TORCH_BOX(&OpsOfEither::tokens_backward));
  m.impl("token_statistics_backward_", TORCH_BOX(&OpsOfEither::tokens_backward_));
  m.impl("distillation", TORCH_BOX(&PairOps<backend>::forward));
  m.impl("distillation_backward", TORCH_BOX(&PairOps<backend>::backward));
  m.impl("distillation_backward_", TORCH_BOX(&PairOps<backend>::backward_));
  m.impl("soft_cross_entropy", TORCH_BOX(&PairOps<backend>::soft));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&PairOps<backend>::soft_backward));
  using OpsOfShard = ShardOps<backend ACCUMLOSS_LOSS_OPTIONS(AS_TYPE)>;
  m.impl("cross_entropy_shard", TORCH_BOX(&OpsOfShard::forward));
  m.impl("cross_entropy_shard_backward", TORCH_BOX(&OpsOfShard::backward));
  m.impl("cross_entropy_shard_backward_", TORCH_BOX(&OpsOfShard::backward_));
  m.impl("scale_", TORCH_BOX(&OpsOfBackend::scale));
  m.impl("scratch", TORCH_BOX(&OpsOfBackend::scratch));
}

STABLE_TORCH_LIBRARY_IMPL(accumloss, CPU, m) {
  register_ops<ready_cpu>(m);
  m.impl("mean_with_grad", TORCH_BOX((&Ops<ready_cpu, int64_t ACCUMLOSS_LOSS_OPTIONS(AS_TYPE)>::mean_with_grad)));
}
#if defined(ACCUMLOSS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(accumloss, CUDA, m) { register_ops<ready_cuda>(m); }
#endif

}  // namespace
}  // namespace accumloss
