// Python module kvbench.bindings._native: the kernels of cuda_src compiled by nvcc, launched through the CUDA runtime.
// Without nvcc (no KVB_NATIVE) it holds no kernels, and has_cuda is False.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"

#if defined(KVB_NATIVE)
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

#if defined(KVB_NATIVE)
constexpr bool has_cuda = true;

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();   // a launch error stays set until it is read: the next launch must not report it again
  throw std::runtime_error(what + ": " + cudaGetErrorName(status) + " (" + std::to_string(status) + "): " +
                           cudaGetErrorString(status));
}

std::string text(const kvb::Sizes& n) {
  return "(" + std::to_string(n[0]) + ", " + std::to_string(n[1]) + ", " + std::to_string(n[2]) + ")";
}

// Makes a device current, and the previous one again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "current CUDA device");
    if (device != previous_) check(cudaSetDevice(device), "CUDA device " + std::to_string(device));
    changed_ = device != previous_;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// An argument is bytes (a scalar, little endian), an address on the device, or None (a null pointer).
void launch(const std::string& name, kvb::Sizes grid, kvb::Sizes block, const py::sequence& args, size_t shared_bytes,
            uintptr_t stream, int device, bool early, bool cooperative) {
  const kvb::ExportedKernel& kernel = kvb::find_kernel(name);
  kvb::check_argument_count(kernel, args.size());
  std::vector<std::string> scalars(args.size());
  std::vector<void*> pointers(args.size()), values(args.size());
  for (size_t i = 0; i < args.size(); ++i) {
    const py::object value = args[i];
    if (py::isinstance<py::bytes>(value)) {
      scalars[i] = kvb::scalar_bytes(kernel, i, value.cast<std::string>());
      values[i] = scalars[i].data();
      continue;
    }
    if (!kernel.parameters[i].is_pointer) throw kvb::argument_error(kernel, i, "the bytes of a scalar");
    if (!value.is_none() && !py::isinstance<py::int_>(value))
      throw kvb::argument_error(kernel, i, "an address or None");
    pointers[i] = value.is_none() ? nullptr : reinterpret_cast<void*>(value.cast<uintptr_t>());
    values[i] = &pointers[i];
  }
  DeviceScope scope(device);
  const auto* function = reinterpret_cast<const void*>(kernel.address);
  if (shared_bytes > 0)   // more than 48 KiB, with what the kernel declares itself, must be asked for
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), kernel.name);
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  int major = 0;
  if (early) check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kernel.name);
  if (major >= 9) {   // a GPU that cannot start a kernel early is not asked to
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(block[0], block[1], block[2]);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaError_t status;
  {
    py::gil_scoped_release release;
    status = cudaLaunchKernelExC(&config, function, values.data());
  }
  if (status != cudaSuccess)
    check(status, kernel.name + ": grid " + text(grid) + ", block " + text(block) + ", " +
                      std::to_string(shared_bytes) + " bytes of shared memory" + (cooperative ? ", cooperative" : ""));
}

// 0 without a driver or a GPU.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

py::dict properties(int device) {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, device), "CUDA device " + std::to_string(device));
  py::dict d;
  d["name"] = std::string(p.name);
  d["compute_capability"] = py::make_tuple(p.major, p.minor);
  d["multiprocessors"] = p.multiProcessorCount;
  d["memory_bytes"] = p.totalGlobalMem;
  d["l2_bytes"] = p.l2CacheSize;
  d["shared_bytes_per_block"] = p.sharedMemPerBlockOptin;
  d["cooperative_launch"] = p.cooperativeLaunch != 0;
  return d;
}
#else
constexpr bool has_cuda = false;

void launch(const std::string& name, kvb::Sizes, kvb::Sizes, const py::sequence&, size_t, uintptr_t, int, bool, bool) {
  throw std::runtime_error(name + ": this build of kvbench has no CUDA kernels");
}
int device_count() { return 0; }
py::dict properties(int) { throw std::runtime_error("this build of kvbench has no CUDA"); }
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The kernels of kvbench.cuda_src compiled by nvcc.";
  module.attr("has_cuda") = has_cuda;
  module.def("kernels", &kvb::list_kernels, "[(name, tested limit of registers per thread)]");
  module.def("launch", &launch, py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("args"),
             py::arg("shared_bytes") = 0, py::arg("stream") = 0, py::arg("device") = 0, py::arg("early") = false,
             py::arg("cooperative") = false,
             "Launch a kernel on a stream of a device, without waiting for it.\n\n"
             "args: bytes (a scalar, little endian), int (an address on the device) or None (a null pointer).\n"
             "Raises RuntimeError with the CUDA error.");
  module.def("device_count", &device_count, "Number of usable CUDA devices; 0 without a driver.");
  module.def("properties", &properties, py::arg("device") = 0, "Facts about a device.");
}
