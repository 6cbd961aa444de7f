// Checks, allocation and the bodies of the ops. Knows no device: a Backend does the work.
#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "row.h"

// Since torch 2.11: weak, so that the module loads in 2.10 too, where torch's allocator serves all gradients.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* deleter_context);

namespace accumloss {
namespace {

using std::optional;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Errors -----------------------------------------------------------------------------------------------------------

template <typename... Parts>
[[noreturn]] void fail(const char* function, const Parts&... parts) {
  std::ostringstream message;
  message << function << ": expected ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_string(const Tensor& tensor) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i > 0 ? ", " : "") << tensor.size(i);
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

const char* dtype_string(ScalarType type) { return torch::headeronly::toString(type); }

Dtype dtype_of(const char* function, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      fail(function, "logits of dtype bfloat16, float16, float32 or float64, got ", dtype_string(logits.scalar_type()),
           "; convert them with .float()");
  }
}

int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      return aoti_torch_dtype_float32();
  }
}

std::vector<int64_t> contiguous_strides(IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return strides;
}

// Uninitialised, contiguous, on the device of another tensor.
Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype_code(dtype), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The same, of its dtype too, and in the backend's own memory where it has any.
Tensor backend_empty(const Backend& backend, const Tensor& like, IntHeaderOnlyArrayRef sizes) {
  void* handle = nullptr;
  void* data = nullptr;
  if (torch_from_blob != nullptr) {
    int64_t bytes = element_size(dtype_of("accumloss", like));
    for (const int64_t size : sizes) bytes *= size;
    data = backend.take_memory(static_cast<size_t>(bytes), &handle);
  }
  if (data == nullptr) return empty(like, sizes, like.scalar_type());
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  AtenTensorHandle tensor = nullptr;
  const AOTITorchError error =
      torch_from_blob(data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                      dtype_code(like.scalar_type()), aoti_torch_device_type_cpu(), like.get_device_index(), &tensor,
                      aoti_torch_layout_strided(), nullptr, 0, backend.release_memory, handle);
  if (error != AOTI_TORCH_SUCCESS) backend.release_memory(data, handle);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(tensor);
}

std::string device_string(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  std::ostringstream out;
  out << (type == aoti_torch_device_type_cuda() ? std::string("cuda") : "a device of type " + std::to_string(type));
  if (tensor.get_device_index() >= 0) out << ":" << tensor.get_device_index();
  return out.str();
}

void check_device(const char* function, const char* name, const Tensor& tensor, const Tensor& like,
                  const char* like_name = "logits") {
  int32_t type = 0, wanted = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &wanted));
  if (type == wanted && tensor.get_device_index() == like.get_device_index()) return;
  fail(function, name, " on the device of ", like_name, ", ", device_string(like), ", got ", device_string(tensor),
       "; move it with .to(", like_name, ".device)");
}

// An option that is out of range, or that the kernels' arithmetic does not hold: ValueError in Python.
[[noreturn]] void fail_option(const char* function, const char* expected, double got) {
  std::ostringstream message;
  message << function << ": expected " << expected << ", got " << got;
  throw std::invalid_argument(message.str());
}

// fp32 has no softcap of 1e308 and no logit_scale of 1e-50; nor may the point where a cap begins be beyond its range,
// since the kernels divide one by the other.
template <typename Acc>
void check_held(const char* function, const char* name, double value) {
  if (value >= std::numeric_limits<Acc>::min() && value <= std::numeric_limits<Acc>::max()) return;
  std::ostringstream expected;
  expected << name << " in [" << std::numeric_limits<Acc>::min() << ", " << std::numeric_limits<Acc>::max()
           << "], which " << (sizeof(Acc) == 8 ? "fp64" : "fp32")
           << " holds (fp64 logits are computed in fp64, all others in fp32)";
  fail_option(function, expected.str().c_str(), value);
}

template <typename Acc>
void check_all_held(const char* function, const LossOptions& options) {
  if (options.label_smoothing != 0) check_held<Acc>(function, "label_smoothing", options.label_smoothing);
  if (options.z_loss != 0) check_held<Acc>(function, "z_loss", options.z_loss);
  check_held<Acc>(function, "logit_scale", options.logit_scale);
  if (options.softcap == 0) return;
  check_held<Acc>(function, "softcap", options.softcap);
  check_held<Acc>(function, "softcap / logit_scale", options.softcap / options.logit_scale);
}

void check_options(const char* function, const LossOptions& options, Dtype dtype) {
  if (options.shift < 0) fail_option(function, "shift >= 0", static_cast<double>(options.shift));
  if (!(options.label_smoothing >= 0 && options.label_smoothing <= 1))
    fail_option(function, "label_smoothing in [0, 1]", options.label_smoothing);
  if (!(options.z_loss >= 0 && std::isfinite(options.z_loss)))
    fail_option(function, "finite z_loss >= 0", options.z_loss);
  if (!(options.softcap >= 0 && std::isfinite(options.softcap)))
    fail_option(function, "finite softcap >= 0 (0 turns it off)", options.softcap);
  if (!(options.logit_scale > 0 && std::isfinite(options.logit_scale)))
    fail_option(function, "finite logit_scale > 0", options.logit_scale);
  if (dtype == Dtype::kFloat64)
    check_all_held<double>(function, options);
  else
    check_all_held<float>(function, options);
}

// Views ------------------------------------------------------------------------------------------------------------

// A tensor (..., T) or (..., T, V) as (B, T): true where one stride serves all dimensions before T.
bool collapse_rows(const Tensor& tensor, int64_t leading, int64_t* stride_b, int64_t* stride_t) {
  *stride_t = leading > 0 ? tensor.stride(leading - 1) : 0;
  *stride_b = 0;
  bool has_inner = false;  // whether a dimension inside of this one has more than one entry
  int64_t next = 0;        // stride that this dimension must have then; may be 0, of one that is expanded
  for (int64_t i = leading - 2; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (!has_inner)
      *stride_b = tensor.stride(i);
    else if (tensor.stride(i) != next)
      return false;
    has_inner = true;
    next = tensor.stride(i) * tensor.size(i);
  }
  return true;
}

// logits as they lie in memory where the kernels can read them so, else a contiguous copy.
Tensor readable_logits(const Tensor& logits) {
  int64_t stride_b, stride_t;
  const int64_t leading = logits.dim() - 1;
  const bool unit = logits.size(leading) == 1 || logits.stride(leading) == 1;
  return unit && collapse_rows(logits, leading, &stride_b, &stride_t) ? logits : torch::stable::contiguous(logits);
}

LogitsView logits_view(const char* function, const Tensor& logits) {
  LogitsView view;
  const int64_t leading = logits.dim() - 1;
  view.data = logits.data_ptr();
  view.dtype = dtype_of(function, logits);
  view.V = logits.size(leading);
  view.T = leading > 0 ? logits.size(leading - 1) : 1;
  view.B = 1;
  for (int64_t i = 0; i < leading - 1; ++i) view.B *= logits.size(i);
  collapse_rows(logits, leading, &view.stride_b, &view.stride_t);
  view.device_index = logits.is_cpu() ? 0 : logits.get_device_index();
  return view;
}

LabelsView labels_view(const Tensor& labels) {
  LabelsView view;
  view.data = labels.data_ptr();
  view.is_int32 = labels.scalar_type() == ScalarType::Int;
  collapse_rows(labels, labels.dim(), &view.stride_b, &view.stride_t);
  return view;
}

// Whether no two of the rows share an element: those (b, t) apart lie |b stride_b + t stride_t| elements apart.
bool rows_are_apart(const LogitsView& view) {
  int64_t outer = view.stride_b, inner = view.stride_t, num_outer = view.B, num_inner = view.T;
  if (num_inner == 1 || (num_outer > 1 && outer < inner)) {
    std::swap(outer, inner);
    std::swap(num_outer, num_inner);
  }
  if (num_inner > 1 && inner < view.V) return false;
  for (int64_t b = 1; b < num_outer; ++b) {  // the rows next to row (b, 0) among rows (0, t)
    const int64_t distance = b * outer;
    const int64_t t = num_inner > 1 ? std::min(distance / inner, num_inner - 1) : 0;
    if (distance - t * inner < view.V) return false;
    if (t + 1 == num_inner) return true;  // all others are further away
    if ((t + 1) * inner - distance < view.V) return false;
  }
  return true;
}

// Whether rows can be overwritten where they lie.
bool is_writable(const char* function, const Tensor& logits) {
  const int64_t leading = logits.dim() - 1;
  int64_t stride_b, stride_t;
  if (logits.numel() == 0) return true;
  if (logits.size(leading) > 1 && logits.stride(leading) != 1) return false;
  return collapse_rows(logits, leading, &stride_b, &stride_t) && rows_are_apart(logits_view(function, logits));
}

// A call's tensors, checked and in the form that the kernels read, and the inputs that point at them.
struct Call {
  Tensor logits, labels;
  optional<Tensor> weight, weight_sum, shard_weight_sum;
  CrossEntropyInputs inputs;
  ScalarType acc;

  Call(const char* function, const Tensor& given_logits, const Tensor& given_labels,
       const optional<Tensor>& given_weight, const LossOptions& options)
      : logits(given_logits), labels(given_labels) {
    check(function, given_weight, options);
    acc = inputs.logits.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
    logits = readable_logits(logits);
    inputs.logits = logits_view(function, logits);
    int64_t stride_b, stride_t;
    if (!collapse_rows(labels, labels.dim(), &stride_b, &stride_t)) labels = torch::stable::contiguous(labels);
    inputs.labels = labels_view(labels);
    inputs.options = options;
    inputs.options.shift = std::min(options.shift, inputs.logits.T);  // no row has a label then; t + shift is in range
    inputs.options.vocab_size = vocab_size;
    inputs.weight = nullptr;
    inputs.weight_sum = inputs.shard_weight_sum = nullptr;
    if (given_weight.has_value()) {
      weight = torch::stable::contiguous(torch::stable::to(*given_weight, acc));
      inputs.weight = static_cast<const char*>(weight->data_ptr()) +
                      options.class_offset * (acc == ScalarType::Double ? sizeof(double) : sizeof(float));
      if (options.label_smoothing > 0) {
        const Tensor wide = torch::stable::to(*weight, ScalarType::Double);
        weight_sum = torch::stable::sum(wide, std::vector<int64_t>{0});
        inputs.weight_sum = static_cast<const double*>(weight_sum->data_ptr());
        if (options.vocab_size != 0) {  // a shard, of all classes too
          AtenTensorHandle of_shard = nullptr;
          const int64_t stride = 1;
          TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(wide.get(), 1, &inputs.logits.V, &stride,
                                                                options.class_offset, &of_shard));
          shard_weight_sum = torch::stable::sum(Tensor(of_shard), std::vector<int64_t>{0});
          inputs.shard_weight_sum = static_cast<const double*>(shard_weight_sum->data_ptr());
        }
      }
    }
  }

  // Uninitialised memory on the logits' device. Straight from the allocator: the dispatcher would take some 3 us each.
  Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) const { return accumloss::empty(logits, sizes, dtype); }
  Tensor scalar(ScalarType dtype) const { return empty({}, dtype); }
  Tensor grad_logits(const Backend& backend) const { return backend_empty(backend, logits, logits.sizes()); }

 private:
  int64_t vocab_size;

  void check(const char* function, const optional<Tensor>& given_weight, const LossOptions& options) {
    if (logits.dim() < 1) fail(function, "logits of shape (..., V), got a 0-dim tensor");
    inputs.logits.dtype = dtype_of(function, logits);
    const int64_t leading = logits.dim() - 1;
    const int64_t V = logits.size(leading);
    if (V < 1) fail(function, "logits of shape (..., V) with V >= 1, got ", shape_string(logits));
    vocab_size = options.vocab_size == 0 ? V : options.vocab_size;
    if (options.class_offset < 0 || options.class_offset > vocab_size - V)
      fail(function, "the classes [class_offset, class_offset + V) of a vocabulary of vocab_size, got V = ", V,
           ", class_offset ", options.class_offset, " and vocab_size ", vocab_size);
    if (options.shift > 0 && leading < 1)
      fail(function, "logits of shape (..., T, V) where shift > 0, got ", shape_string(logits));
    if (labels.scalar_type() != ScalarType::Long && labels.scalar_type() != ScalarType::Int)
      fail(function, "labels of dtype int64 or int32, got ", dtype_string(labels.scalar_type()),
           "; convert them with .long()");
    bool matches = labels.dim() == leading;
    for (int64_t i = 0; matches && i < leading; ++i) matches = labels.size(i) == logits.size(i);
    if (!matches)
      fail(function, "labels of shape ", shape_string(logits), " without its last dimension, got ",
           shape_string(labels), "; labels are class indices, one for each row of logits");
    check_device(function, "labels", labels, logits);
    if (given_weight.has_value()) {
      if (given_weight->dim() != 1 || given_weight->size(0) != vocab_size)
        fail(function, "weight of shape (V,) = (", vocab_size, ",), got ", shape_string(*given_weight));
      const ScalarType type = given_weight->scalar_type();
      if (type != ScalarType::BFloat16 && type != ScalarType::Half && type != ScalarType::Float &&
          type != ScalarType::Double)
        fail(function, "weight of a floating dtype, got ", dtype_string(type));
      check_device(function, "weight", *given_weight, logits);
    }
    check_options(function, options, inputs.logits.dtype);
  }
};

// The five sums of a call and the pointers to them.
struct SumTensors {
  Tensor loss_sum, num_items, total_weight, num_correct, entropy_sum;

  explicit SumTensors(const Call& call)
      : loss_sum(call.scalar(call.acc)),
        num_items(call.scalar(ScalarType::Long)),
        total_weight(call.scalar(call.acc)),
        num_correct(call.scalar(ScalarType::Long)),
        entropy_sum(call.scalar(call.acc)) {}

  CrossEntropySums pointers() const {
    return {loss_sum.data_ptr(),     static_cast<int64_t*>(num_items.data_ptr()),
            total_weight.data_ptr(), static_cast<int64_t*>(num_correct.data_ptr()),
            entropy_sum.data_ptr(),  nullptr};
  }
};

// grad_loss_sum as a 0-dim tensor of the accumulation dtype.
Tensor checked_grad(const char* function, const Tensor& grad_loss_sum, const Call& call) {
  if (grad_loss_sum.numel() != 1)
    fail(function, "grad_loss_sum with one element, got shape ", shape_string(grad_loss_sum));
  check_device(function, "grad_loss_sum", grad_loss_sum, call.logits);
  return grad_loss_sum.scalar_type() == call.acc ? grad_loss_sum : torch::stable::to(grad_loss_sum, call.acc);
}

void check_in_place(const char* function, const Tensor& logits) {
  if (logits.dim() < 1 || is_writable(function, logits)) return;
  std::ostringstream strides;
  for (int64_t i = 0; i < logits.dim(); ++i) strides << (i > 0 ? ", " : "") << logits.stride(i);
  fail(function, "logits of shape (..., V) with unit stride along V, at most two strides before it, and rows that do ",
       "not overlap, since the gradient overwrites them, got shape ", shape_string(logits), " and strides (",
       strides.str(), "); pass logits.contiguous(), or leave in-place off");
}

void check_saved(const char* function, const char* name, const Tensor& saved, ScalarType dtype, const Call& call) {
  if (saved.scalar_type() != dtype || saved.numel() != call.labels.numel() || !saved.is_contiguous())
    fail(function, name, " as cross_entropy returned it for these logits, got ", dtype_string(saved.scalar_type()),
         " of shape ", shape_string(saved));
  check_device(function, name, saved, call.logits);
}

}  // namespace

ForwardOutputs cross_entropy(const Backend& backend, const Tensor& logits, const Tensor& labels,
                             const optional<Tensor>& weight, const LossOptions& options) {
  const Call call("cross_entropy", logits, labels, weight, options);
  const SumTensors sums(call);
  const Tensor lse = call.empty(labels.sizes(), ScalarType::Double);
  const Tensor nll = call.empty(labels.sizes(), call.acc);
  backend.forward(call.inputs, sums.pointers(), static_cast<double*>(lse.data_ptr()), nll.data_ptr());
  return {sums.loss_sum, sums.num_items, sums.total_weight, lse, sums.num_correct, sums.entropy_sum, nll};
}

static void backward_into(const Backend& backend, const char* function, const Tensor& grad_loss_sum, const Call& call,
                          const Tensor& lse, const Tensor& nll, const Tensor& grad_logits) {
  const Tensor grad = checked_grad(function, grad_loss_sum, call);
  check_saved(function, "lse", lse, ScalarType::Double, call);
  check_saved(function, "nll", nll, call.acc, call);
  backend.backward(call.inputs, static_cast<const double*>(lse.data_ptr()), nll.data_ptr(), grad.data_ptr(),
                   logits_view(function, grad_logits));
}

Tensor cross_entropy_backward(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                              const Tensor& labels, const Tensor& lse, const Tensor& nll,
                              const optional<Tensor>& weight, const LossOptions& options) {
  const Call call("cross_entropy_backward", logits, labels, weight, options);
  const Tensor grad_logits = call.grad_logits(backend);
  backward_into(backend, "cross_entropy_backward", grad_loss_sum, call, lse, nll, grad_logits);
  return grad_logits;
}

void cross_entropy_backward_(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                             const Tensor& labels, const Tensor& lse, const Tensor& nll, const optional<Tensor>& weight,
                             const LossOptions& options) {
  check_in_place("cross_entropy_backward_", logits);
  const Call call("cross_entropy_backward_", logits, labels, weight, options);
  backward_into(backend, "cross_entropy_backward_", grad_loss_sum, call, lse, nll, logits);
}

TokenOutputs token_statistics(const Backend& backend, const Tensor& logits, const Tensor& labels,
                              const optional<Tensor>& weight, const LossOptions& options) {
  const Call call("token_statistics", logits, labels, weight, options);
  const Tensor loss = call.empty(labels.sizes(), call.acc), nll = call.empty(labels.sizes(), call.acc);
  const Tensor lse = call.empty(labels.sizes(), ScalarType::Double);
  const std::vector<int64_t> none = {0};
  const IntHeaderOnlyArrayRef sizes = options.metrics ? labels.sizes() : IntHeaderOnlyArrayRef(none);
  const Tensor entropy = call.empty(sizes, call.acc), argmax = call.empty(sizes, ScalarType::Long);
  backend.forward_tokens(call.inputs, {loss.data_ptr(), static_cast<double*>(lse.data_ptr()), nll.data_ptr(),
                                       entropy.data_ptr(), static_cast<int64_t*>(argmax.data_ptr())});
  return {loss, nll, lse, entropy, argmax};
}

// The gradient of each row, (...) double.
static Tensor checked_row_grad(const char* function, const char* name, const Tensor& grad, const Call& call) {
  if (grad.dim() != call.labels.dim() ||
      !std::equal(grad.sizes().begin(), grad.sizes().end(), call.labels.sizes().begin(), call.labels.sizes().end()))
    fail(function, name, " of shape ", shape_string(call.labels), " as labels, got ", shape_string(grad));
  check_device(function, name, grad, call.logits);
  return torch::stable::contiguous(torch::stable::to(grad, ScalarType::Double));
}

static void tokens_backward_into(const Backend& backend, const char* function, const TokenGradTensors& grads,
                                 const Call& call, const Tensor& nll, const Tensor& lse, const Tensor& entropy,
                                 const Tensor& grad_logits) {
  check_saved(function, "lse", lse, ScalarType::Double, call);
  check_saved(function, "nll", nll, call.acc, call);
  if (grads.entropy.has_value()) check_saved(function, "entropy", entropy, call.acc, call);
  std::vector<Tensor> kept;  // as long as the kernel runs
  const auto of = [&](const char* name, const optional<Tensor>& grad) -> const double* {
    if (!grad.has_value()) return nullptr;
    kept.push_back(checked_row_grad(function, name, *grad, call));
    return static_cast<const double*>(kept.back().data_ptr());
  };
  const TokenGrads views = {of("grad_loss", grads.loss), of("grad_lse", grads.lse), of("grad_nll", grads.nll),
                            of("grad_entropy", grads.entropy)};
  backend.backward_tokens(call.inputs, static_cast<const double*>(lse.data_ptr()), nll.data_ptr(), entropy.data_ptr(),
                          views, logits_view(function, grad_logits));
}

Tensor token_statistics_backward(const Backend& backend, const TokenGradTensors& grads, const Tensor& logits,
                                 const Tensor& labels, const Tensor& nll, const Tensor& lse, const Tensor& entropy,
                                 const optional<Tensor>& weight, const LossOptions& options) {
  const Call call("token_statistics_backward", logits, labels, weight, options);
  const Tensor grad_logits = call.grad_logits(backend);
  tokens_backward_into(backend, "token_statistics_backward", grads, call, nll, lse, entropy, grad_logits);
  return grad_logits;
}

void token_statistics_backward_(const Backend& backend, const TokenGradTensors& grads, const Tensor& logits,
                                const Tensor& labels, const Tensor& nll, const Tensor& lse, const Tensor& entropy,
                                const optional<Tensor>& weight, const LossOptions& options) {
  check_in_place("token_statistics_backward_", logits);
  const Call call("token_statistics_backward_", logits, labels, weight, options);
  tokens_backward_into(backend, "token_statistics_backward_", grads, call, nll, lse, entropy, logits);
}

// Another tensor (..., V) of the logits' shape, dtype and device, as the kernels read it.
static Tensor readable_like(const char* function, const char* name, const Tensor& other, const Tensor& logits,
                            const char* logits_name) {
  if (other.scalar_type() != logits.scalar_type())
    fail(function, name, " of the dtype of ", logits_name, ", ", dtype_string(logits.scalar_type()), ", got ",
         dtype_string(other.scalar_type()), "; convert one of them");
  if (other.dim() != logits.dim() ||
      !std::equal(other.sizes().begin(), other.sizes().end(), logits.sizes().begin(), logits.sizes().end()))
    fail(function, name, " of shape ", shape_string(logits), " as ", logits_name, ", got ", shape_string(other));
  check_device(function, name, other, logits, logits_name);
  return readable_logits(other);
}

// A call's student, checked, beside its teacher.
struct DistillationCall {
  Call student;
  Tensor teacher;
  DistillationInputs inputs;

  DistillationCall(const char* function, const Tensor& student_logits, const Tensor& teacher_logits,
                   const Tensor& labels, double beta, const LossOptions& options)
      : student(function, student_logits, labels, {}, options),
        teacher(readable_like(function, "teacher_logits", teacher_logits, student_logits, "student_logits")) {
    if (!(beta >= 0 && beta <= 1)) fail_option(function, "beta in [0, 1]", beta);
    inputs = {student.inputs, logits_view(function, teacher), beta};
  }
};

static DistillationRows distillation_rows(const DistillationOutputs& found) {
  const auto& [loss, lse, teacher_lse, of_student, of_teacher] = found;
  const auto numbers = [](const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); };
  return {loss.data_ptr(), numbers(lse), numbers(teacher_lse), numbers(of_student), numbers(of_teacher)};
}

DistillationOutputs distillation(const Backend& backend, const Tensor& student_logits, const Tensor& teacher_logits,
                                 const Tensor& labels, double beta, const LossOptions& options) {
  const DistillationCall call("distillation", student_logits, teacher_logits, labels, beta, options);
  const auto numbers = [&] { return call.student.empty(labels.sizes(), ScalarType::Double); };
  const DistillationOutputs found = {call.student.empty(labels.sizes(), call.student.acc), numbers(), numbers(),
                                     numbers(), numbers()};
  backend.forward_distillation(call.inputs, distillation_rows(found));
  return found;
}

static void distillation_backward_into(const Backend& backend, const char* function, const DistillationCall& call,
                                       const Tensor& grad_loss, const DistillationOutputs& found,
                                       const Tensor& grad_logits) {
  const Tensor grad = checked_row_grad(function, "grad_loss", grad_loss, call.student);
  check_saved(function, "lse", std::get<1>(found), ScalarType::Double, call.student);
  check_saved(function, "teacher_lse", std::get<2>(found), ScalarType::Double, call.student);
  check_saved(function, "of_student", std::get<3>(found), ScalarType::Double, call.student);
  check_saved(function, "of_teacher", std::get<4>(found), ScalarType::Double, call.student);
  backend.backward_distillation(call.inputs, distillation_rows(found), static_cast<const double*>(grad.data_ptr()),
                                logits_view(function, grad_logits));
}

Tensor distillation_backward(const Backend& backend, const Tensor& grad_loss, const Tensor& student_logits,
                             const Tensor& teacher_logits, const Tensor& labels, const DistillationOutputs& found,
                             double beta, const LossOptions& options) {
  const char* const function = "distillation_backward";
  const DistillationCall call(function, student_logits, teacher_logits, labels, beta, options);
  const Tensor grad_logits = call.student.grad_logits(backend);
  distillation_backward_into(backend, function, call, grad_loss, found, grad_logits);
  return grad_logits;
}

void distillation_backward_(const Backend& backend, const Tensor& grad_loss, const Tensor& student_logits,
                            const Tensor& teacher_logits, const Tensor& labels, const DistillationOutputs& found,
                            double beta, const LossOptions& options) {
  const char* const function = "distillation_backward_";
  check_in_place(function, student_logits);
  const DistillationCall call(function, student_logits, teacher_logits, labels, beta, options);
  distillation_backward_into(backend, function, call, grad_loss, found, student_logits);
}

// A call against class probabilities. label: (...) int64, in the place of labels, which nothing reads.
struct TargetCall {
  Call logits;
  Tensor targets;
  TargetInputs inputs;

  TargetCall(const char* function, const Tensor& given_logits, const Tensor& given_targets, const Tensor& label,
             const optional<Tensor>& weight, const LossOptions& options)
      : logits(function, given_logits, label, weight, options),
        targets(readable_like(function, "targets", given_targets, given_logits, "logits")),
        inputs{logits.inputs, logits_view(function, targets)} {}
};

static TargetRows target_rows(const TargetOutputs& found) {
  const auto& [loss, nll, lse, total, of_label, label] = found;
  const auto numbers = [](const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); };
  return {loss.data_ptr(), nll.data_ptr(),    numbers(lse),
          numbers(total),  numbers(of_label), static_cast<int64_t*>(label.data_ptr())};
}

TargetOutputs soft_cross_entropy(const Backend& backend, const Tensor& logits, const Tensor& targets,
                                 const optional<Tensor>& weight, const LossOptions& options) {
  const char* const function = "soft_cross_entropy";
  if (logits.dim() < 1) fail(function, "logits of shape (..., V), got a 0-dim tensor");
  const std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  const Tensor label = empty(logits, sizes, ScalarType::Long);
  const TargetCall call(function, logits, targets, label, weight, options);
  const auto of = [&](ScalarType dtype) { return call.logits.empty(sizes, dtype); };
  const TargetOutputs found = {of(call.logits.acc),    of(call.logits.acc),    of(ScalarType::Double),
                               of(ScalarType::Double), of(ScalarType::Double), label};
  backend.forward_targets(call.inputs, target_rows(found));
  return found;
}

Tensor soft_cross_entropy_backward(const Backend& backend, const Tensor& grad_loss, const Tensor& logits,
                                   const Tensor& targets, const TargetOutputs& found, const optional<Tensor>& weight,
                                   const LossOptions& options) {
  const char* const function = "soft_cross_entropy_backward";
  const TargetCall call(function, logits, targets, std::get<5>(found), weight, options);
  const Tensor grad = checked_row_grad(function, "grad_loss", grad_loss, call.logits);
  check_saved(function, "nll", std::get<1>(found), call.logits.acc, call.logits);
  check_saved(function, "lse", std::get<2>(found), ScalarType::Double, call.logits);
  check_saved(function, "total", std::get<3>(found), ScalarType::Double, call.logits);
  check_saved(function, "of_label", std::get<4>(found), ScalarType::Double, call.logits);
  check_saved(function, "label", std::get<5>(found), ScalarType::Long, call.logits);
  const Tensor grad_logits = call.logits.grad_logits(backend);
  backend.backward_targets(call.inputs, target_rows(found), static_cast<const double*>(grad.data_ptr()),
                           logits_view(function, grad_logits));
  return grad_logits;
}

Tensor cross_entropy_shard(const Backend& backend, const Tensor& logits, const Tensor& labels,
                           const optional<Tensor>& weight, const LossOptions& options) {
  const Call call("cross_entropy_shard", logits, labels, weight, options);
  std::vector<int64_t> sizes = {ShardColumns::count(options)};
  for (const int64_t size : labels.sizes()) sizes.push_back(size);
  const Tensor columns = call.empty(sizes, ScalarType::Double);
  backend.forward_shard(call.inputs, static_cast<double*>(columns.data_ptr()));
  return columns;
}

Tensor cross_entropy_shard_backward(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                                    const Tensor& labels, const Tensor& lse, const Tensor& nll,
                                    const optional<Tensor>& weight, const LossOptions& options) {
  const Call call("cross_entropy_shard_backward", logits, labels, weight, options);
  const Tensor grad_logits = call.grad_logits(backend);
  backward_into(backend, "cross_entropy_shard_backward", grad_loss_sum, call, lse, nll, grad_logits);
  return grad_logits;
}

void cross_entropy_shard_backward_(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                                   const Tensor& labels, const Tensor& lse, const Tensor& nll,
                                   const optional<Tensor>& weight, const LossOptions& options) {
  check_in_place("cross_entropy_shard_backward_", logits);
  const Call call("cross_entropy_shard_backward_", logits, labels, weight, options);
  backward_into(backend, "cross_entropy_shard_backward_", grad_loss_sum, call, lse, nll, logits);
}

WithGradOutputs cross_entropy_with_grad(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                                        const Tensor& labels, const optional<Tensor>& weight,
                                        const LossOptions& options) {
  const Call call("cross_entropy_with_grad", logits, labels, weight, options);
  const SumTensors sums(call);
  const Tensor grad = checked_grad("cross_entropy_with_grad", grad_loss_sum, call);
  const Tensor grad_logits = call.grad_logits(backend);
  backend.forward_with_grad(call.inputs, sums.pointers(), grad.data_ptr(),
                            logits_view("cross_entropy_with_grad", grad_logits));
  return {sums.loss_sum, sums.num_items, sums.total_weight, sums.num_correct, sums.entropy_sum, grad_logits};
}

InPlaceOutputs cross_entropy_with_grad_(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                                        const Tensor& labels, const optional<Tensor>& weight,
                                        const LossOptions& options) {
  check_in_place("cross_entropy_with_grad_", logits);
  const Call call("cross_entropy_with_grad_", logits, labels, weight, options);
  const SumTensors sums(call);
  const Tensor grad = checked_grad("cross_entropy_with_grad_", grad_loss_sum, call);
  backend.forward_with_grad(call.inputs, sums.pointers(), grad.data_ptr(), call.inputs.logits);
  return {sums.loss_sum, sums.num_items, sums.total_weight, sums.num_correct, sums.entropy_sum};
}

void add_cross_entropy_(const Backend& backend, const Tensor& totals, const optional<Tensor>& grad_loss_sum,
                        const Tensor& logits, const Tensor& labels, const optional<Tensor>& weight,
                        const LossOptions& options) {
  constexpr const char* kName = "add_cross_entropy_";
  if (grad_loss_sum.has_value()) check_in_place(kName, logits);
  const Call call(kName, logits, labels, weight, options);
  if (totals.dim() != 1 || totals.size(0) != 5 || totals.scalar_type() != ScalarType::Double || !totals.is_contiguous())
    fail(kName, "contiguous totals (5,) of dtype double, got ", dtype_string(totals.scalar_type()), " of shape ",
         shape_string(totals));
  check_device(kName, "totals", totals, call.logits);
  const CrossEntropySums sums = {nullptr, nullptr, nullptr, nullptr, nullptr, static_cast<double*>(totals.data_ptr())};
  if (grad_loss_sum.has_value()) {
    const Tensor grad = checked_grad(kName, *grad_loss_sum, call);
    backend.forward_with_grad(call.inputs, sums, grad.data_ptr(), call.inputs.logits);
  } else {
    const Tensor lse = call.empty(labels.sizes(), ScalarType::Double);
    const Tensor nll = call.empty(labels.sizes(), call.acc);
    backend.forward(call.inputs, sums, static_cast<double*>(lse.data_ptr()), nll.data_ptr());
  }
}

namespace {

// As torch divides a number by a tensor: the reciprocal times the number.
template <typename Acc>
Acc quotient(double number, Acc divisor) {
  const Acc reciprocal = Acc(1) / divisor;
  return number == 1 ? reciprocal : reciprocal * static_cast<Acc>(number);
}

template <typename Acc>
std::tuple<Tensor, Tensor> mean_with_grad_as(const Backend& backend, const Call& call, const void* divisor,
                                             double expected_grad, const Tensor& grad_logits) {
  const Acc n = *static_cast<const Acc*>(divisor);
  const Acc factor = quotient(expected_grad, n);
  Acc loss_sum, total_weight, entropy_sum;
  int64_t num_items, num_correct;
  backend.forward_with_grad(call.inputs, {&loss_sum, &num_items, &total_weight, &num_correct, &entropy_sum, nullptr},
                            &factor, logits_view("mean_with_grad", grad_logits));
  const Tensor loss = call.scalar(call.acc);
  *static_cast<Acc*>(loss.data_ptr()) = loss_sum / n;
  return {loss, grad_logits};
}

}  // namespace

std::tuple<Tensor, Tensor> mean_with_grad(const Backend& backend, const Tensor& divisor, const Tensor& logits,
                                          const Tensor& labels, const optional<Tensor>& weight, double expected_grad,
                                          const LossOptions& options) {
  const Call call("mean_with_grad", logits, labels, weight, options);
  if (divisor.numel() != 1 || divisor.scalar_type() != call.acc)
    fail("mean_with_grad", "a divisor of dtype ", dtype_string(call.acc), " with one element, got ",
         dtype_string(divisor.scalar_type()), " of shape ", shape_string(divisor));
  check_device("mean_with_grad", "divisor", divisor, call.logits);
  const Tensor grad_logits = call.grad_logits(backend);
  const auto run = call.acc == ScalarType::Double ? mean_with_grad_as<double> : mean_with_grad_as<float>;
  return run(backend, call, divisor.data_ptr(), expected_grad, grad_logits);
}

void scale_(const Backend& backend, const Tensor& values, const Tensor& factor) {
  const Dtype dtype = dtype_of("scale_", values);
  if (values.dim() < 1) fail("scale_", "values of shape (..., n), got a 0-dim tensor; pass values.view(1)");
  if (!values.is_contiguous()) fail("scale_", "contiguous values, got shape ", shape_string(values));
  if (factor.numel() != 1) fail("scale_", "a factor with one element, got shape ", shape_string(factor));
  check_device("scale_", "factor", factor, values, "values");
  const ScalarType acc = dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const Tensor f = factor.scalar_type() == acc ? factor : torch::stable::to(factor, acc);
  const LogitsView view = logits_view("scale_", values);
  backend.scale(view, f.data_ptr());
}

Tensor scratch(const Backend& backend, const Tensor& like, int64_t rows, int64_t columns) {
  dtype_of("scratch", like);
  if (rows < 0 || columns < 0) fail("scratch", "rows and columns >= 0, got ", rows, " and ", columns);
  return backend_empty(backend, like, {rows, columns});
}

}  // namespace accumloss
