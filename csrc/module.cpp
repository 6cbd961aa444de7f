// The Python module accumloss._C: what is no op. The only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <map>
#include <string>

#include "cpu/instruction_set.h"
#include "cpu/kept_memory.h"
#include "cpu/memory_limit.h"
#include "cuda/plan.h"
#if defined(ACCUMLOSS_WITH_CUDA)
#include "cuda/bad_labels.h"
#endif

namespace accumloss {
namespace {

// The fields of accumloss.CudaPlan.
pybind11::tuple fields(const cuda::Plan& plan) {
  const pybind11::object resident =
      plan.resident > 0 ? pybind11::object(pybind11::int_(plan.resident)) : pybind11::none();
  return pybind11::make_tuple(cuda::kKernelNames[static_cast<int>(plan.kernel)], plan.threads, plan.cluster,
                              plan.stages, plan.shared_bytes, plan.bytes_per_element, resident, plan.groups);
}

// dtype and pass are the enumerations' numbers. gpu: of the table, or empty.
pybind11::tuple plan(int64_t V, int dtype, int pass, int capability, bool aligned, const std::string& gpu) {
  cuda::Plan plan = cuda::choose_plan(
      {V, static_cast<Dtype>(dtype), static_cast<cuda::Pass>(pass), capability, aligned, /*staged=*/true});
  for (const cuda::Gpu& known : cuda::kGpus) {
    if (gpu == known.name) plan.resident = cuda::resident_on(known, plan, static_cast<cuda::Pass>(pass));
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
  info["without_cuda"] = pybind11::none();
#else
  info["cuda"] = pybind11::none();
  info["cuda_architectures"] = pybind11::none();
  info["without_cuda"] = ACCUMLOSS_WITHOUT_CUDA;
#endif
  info["cpu_capability"] = cpu::instruction_set_name();
  return info;
}

// Raises what a CUDA kernel recorded since the last time, if anything.
void check() {
#if defined(ACCUMLOSS_WITH_CUDA)
  check_bad_labels();
#endif
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
