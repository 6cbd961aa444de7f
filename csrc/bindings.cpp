// All op schemas and registrations, and the pybind11 module. The only file that names dispatch keys.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <map>
#include <string>

#include "cpu/instruction_set.h"
#include "cpu/kept_memory.h"
#include "cpu/memory_limit.h"
#include "cuda/plan.h"
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
  m.def("scale_(Tensor(a!) values, Tensor factor) -> ()");
  m.def("scratch(Tensor like, int rows, int columns) -> Tensor");
  // Both are cross_entropy through the dispatcher, in ops.py: there an error keeps its type and message.
  m.def("causal_lm(Tensor logits, Tensor labels, Tensor? weight=None, *" LM_OPTIONS
        ") -> (Tensor loss_sum, Tensor num_items)");
  m.def("masked_lm(Tensor logits, Tensor labels, Tensor? weight=None, *" LM_OPTIONS
        ") -> (Tensor loss_sum, Tensor num_items)");
}

#if defined(ACCUMLOSS_WITH_CUDA)
// Raises what a CUDA kernel recorded since the last time, if anything.
void check() {
  int64_t row = 0, label = 0;
  if (!take_bad_label(&row, &label)) return;
  throw std::out_of_range("cross_entropy: expected labels in [0, V) or ignore_index, got " + std::to_string(label) +
                          " for row " + std::to_string(row) +
                          " of an earlier call on CUDA; check vocab_size and the value that pads the labels");
}
#else
void check() {}
#endif

const Backend& ready_cpu() { return cpu_backend(); }
#if defined(ACCUMLOSS_WITH_CUDA)
const Backend& ready_cuda() {
  check();  // what the kernels of an earlier call met
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
  static void scale(Tensor values, Tensor factor) { scale_(backend(), values, factor); }
  static Tensor scratch(Tensor like, int64_t rows, int64_t columns) {
    return accumloss::scratch(backend(), like, rows, columns);
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
  m.impl("scale_", TORCH_BOX(&OpsOfBackend::scale));
  m.impl("scratch", TORCH_BOX(&OpsOfBackend::scratch));
}

STABLE_TORCH_LIBRARY_IMPL(accumloss, CPU, m) { register_ops<ready_cpu>(m); }
#if defined(ACCUMLOSS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(accumloss, CUDA, m) { register_ops<ready_cuda>(m); }
#endif

// The fields of accumloss.CudaPlan.
pybind11::tuple fields(const cuda::Plan& plan) {
  const pybind11::object resident =
      plan.resident > 0 ? pybind11::object(pybind11::int_(plan.resident)) : pybind11::none();
  return pybind11::make_tuple(cuda::kKernelNames[static_cast<int>(plan.kernel)], plan.threads, plan.cluster,
                              plan.stages, plan.shared_bytes, plan.bytes_per_element, resident);
}

// dtype and pass are the enumerations' numbers. gpu: of the table, or empty.
pybind11::tuple plan(int64_t V, int dtype, int pass, int capability, bool aligned, const std::string& gpu) {
  cuda::Plan plan = cuda::choose_plan(
      {V, static_cast<Dtype>(dtype), static_cast<cuda::Pass>(pass), capability, aligned, /*staged=*/true});
  for (const cuda::Gpu& known : cuda::kGpus) {
    if (gpu == known.name) plan.resident = cuda::resident_on(known, plan);
  }
  return fields(plan);
}

#if defined(ACCUMLOSS_WITH_CUDA)
pybind11::tuple device_plan(int device_index, int64_t V, int dtype, int pass, bool aligned) {
  return fields(cuda::device_plan(device_index, V, static_cast<Dtype>(dtype), static_cast<cuda::Pass>(pass), aligned));
}
#endif

// The GPUs that plan() knows by name, and their capabilities.
std::map<std::string, int> gpus() {
  std::map<std::string, int> found;
  for (const cuda::Gpu& gpu : cuda::kGpus) found[gpu.name] = gpu.capability;
  return found;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = ACCUMLOSS_VERSION;
  info["torch"] = ACCUMLOSS_BUILT_WITH_TORCH;
  info["compiler"] = __VERSION__;
#if defined(ACCUMLOSS_WITH_CUDA)
  info["cuda"] = ACCUMLOSS_CUDA_VERSION;
  info["cuda_architectures"] = ACCUMLOSS_CUDA_ARCHITECTURES;
#else
  info["cuda"] = pybind11::none();
  info["cuda_architectures"] = pybind11::none();
#endif
  info["cpu_capability"] = cpu::instruction_set_name();
  return info;
}

}  // namespace
}  // namespace accumloss

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of accumloss; importing it registers torch.ops.accumloss.";
  m.def("build_info", &accumloss::build_info,
        "What this build was made from and with, and the CPU instruction set that is in use.");
  m.def("empty_cache", &accumloss::cpu::release_kept_memory,
        "Returns the kept memory to the system; the number of its bytes.");
  m.def("most_kept", &accumloss::cpu::most_kept, pybind11::arg("wanted") = std::numeric_limits<size_t>::max(),
        "The bytes that may be kept now, of all blocks together; where more than wanted, perhaps too few.");
  m.def("read_limits_below", &accumloss::cpu::read_limits_below,
        "For tests: the folder that most_kept takes for the root of the file system; empty for the root itself.");
  m.def("plan", &accumloss::plan, "The CUDA kernel that serves a call on such a device.");
#if defined(ACCUMLOSS_WITH_CUDA)
  m.def("device_plan", &accumloss::device_plan, "The CUDA kernel that serves a call on a device of this machine.");
#endif
  m.def("gpus", &accumloss::gpus, "The GPUs that plan() knows by name, and their capabilities.");
  m.def("check", &accumloss::check, "Raises IndexError if a CUDA kernel has met a label outside [0, V).");
}
