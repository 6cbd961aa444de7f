// The Python module accumloss._C: what is no op. By Python's own interface: pybind11 would take longer to compile than
// all else that knows Python, and would be one more thing that a build has to install.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <stdexcept>
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

// What call() returns, or null with the Python exception that stands for what it threw: as torch translates those of
// the ops.
template <typename Call>
PyObject* translated(const Call& call) {
  try {
    return call();
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* build_info(PyObject*, PyObject*) {
#if defined(ACCUMLOSS_WITH_CUDA)
  constexpr const char* kCuda = ACCUMLOSS_CUDA_VERSION;
  constexpr const char* kArchitectures = ACCUMLOSS_CUDA_ARCHITECTURES;
#else
  constexpr const char* kCuda = nullptr;  // None
  constexpr const char* kArchitectures = nullptr;
#endif
  return translated([&] {
    return Py_BuildValue("{s:s,s:s,s:s,s:z,s:z,s:s}", "version", ACCUMLOSS_VERSION, "torch", ACCUMLOSS_BUILT_WITH_TORCH,
                         "compiler", __VERSION__, "cuda", kCuda, "cuda_architectures", kArchitectures, "cpu_capability",
                         cpu::instruction_set_name());
  });
}

PyObject* empty_cache(PyObject*, PyObject*) { return PyLong_FromSize_t(cpu::release_kept_memory()); }

PyObject* most_kept(PyObject*, PyObject* arguments) {
  PyObject* given = nullptr;
  if (!PyArg_ParseTuple(arguments, "|O!:most_kept", &PyLong_Type, &given)) return nullptr;
  const size_t wanted = given != nullptr ? PyLong_AsSize_t(given) : std::numeric_limits<size_t>::max();
  if (given != nullptr && PyErr_Occurred() != nullptr) return nullptr;
  return PyLong_FromSize_t(cpu::most_kept(wanted));
}

PyObject* read_limits_below(PyObject*, PyObject* arguments) {
  const char* folder = nullptr;
  if (!PyArg_ParseTuple(arguments, "s:read_limits_below", &folder)) return nullptr;
  return translated([&] {
    cpu::read_limits_below(folder);
    Py_RETURN_NONE;
  });
}

// The fields of accumloss.CudaPlan.
PyObject* fields(const cuda::Plan& plan) {
  PyObject* const resident = plan.resident > 0 ? PyLong_FromLongLong(plan.resident) : Py_NewRef(Py_None);
  return Py_BuildValue("(siiiLdN)", cuda::kKernelNames[static_cast<int>(plan.kernel)], plan.threads, plan.cluster,
                       plan.stages, static_cast<long long>(plan.shared_bytes), plan.bytes_per_element, resident);
}

// dtype and pass are the enumerations' numbers. gpu: of the table, or empty.
PyObject* plan(PyObject*, PyObject* arguments) {
  long long V = 0;
  int dtype = 0, pass = 0, capability = 0, aligned = 0;
  const char* gpu = nullptr;
  if (!PyArg_ParseTuple(arguments, "Liiips:plan", &V, &dtype, &pass, &capability, &aligned, &gpu)) return nullptr;
  return translated([&] {
    cuda::Plan found = cuda::choose_plan(
        {V, static_cast<Dtype>(dtype), static_cast<cuda::Pass>(pass), capability, aligned != 0, /*staged=*/true});
    for (const cuda::Gpu& known : cuda::kGpus) {
      if (std::string(gpu) == known.name) found.resident = cuda::resident_on(known, found);
    }
    return fields(found);
  });
}

// The GPUs that plan() knows by name, and their capabilities.
PyObject* gpus(PyObject*, PyObject*) {
  PyObject* const found = PyDict_New();
  for (const cuda::Gpu& gpu : cuda::kGpus) {
    PyObject* const capability = found != nullptr ? PyLong_FromLong(gpu.capability) : nullptr;
    const bool failed = capability == nullptr || PyDict_SetItemString(found, gpu.name, capability) != 0;
    Py_XDECREF(capability);
    if (failed) {
      Py_XDECREF(found);
      return nullptr;
    }
  }
  return found;
}

#if defined(ACCUMLOSS_WITH_CUDA)
PyObject* device_plan(PyObject*, PyObject* arguments) {
  int device_index = 0, dtype = 0, pass = 0, aligned = 0;
  long long V = 0;
  if (!PyArg_ParseTuple(arguments, "iLiip:device_plan", &device_index, &V, &dtype, &pass, &aligned)) return nullptr;
  return translated([&] {
    return fields(
        cuda::device_plan(device_index, V, static_cast<Dtype>(dtype), static_cast<cuda::Pass>(pass), aligned != 0));
  });
}
#endif

PyObject* check(PyObject*, PyObject*) {
  return translated([] {
#if defined(ACCUMLOSS_WITH_CUDA)
    check_bad_labels();
#endif
    Py_RETURN_NONE;
  });
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "What this build was made from and with, and the CPU instruction set that is in use."},
    {"empty_cache", empty_cache, METH_NOARGS, "Returns the kept memory to the system; the number of its bytes."},
    {"most_kept", most_kept, METH_VARARGS,
     "The bytes that may be kept now, of all blocks together; where more than wanted, perhaps too few."},
    {"read_limits_below", read_limits_below, METH_VARARGS,
     "For tests: the folder that most_kept takes for the root of the file system; empty for the root itself."},
    {"plan", plan, METH_VARARGS, "The CUDA kernel that serves a call on such a device."},
#if defined(ACCUMLOSS_WITH_CUDA)
    {"device_plan", device_plan, METH_VARARGS, "The CUDA kernel that serves a call on a device of this machine."},
#endif
    {"gpus", gpus, METH_NOARGS, "The GPUs that plan() knows by name, and their capabilities."},
    {"check", check, METH_NOARGS, "Raises IndexError if a CUDA kernel has met a label outside [0, V)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "The compiled part of accumloss; importing it registers torch.ops.accumloss.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace accumloss

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&accumloss::definition); }
