// Python module kvbench.bindings._simt: the kernels of cuda_src, emulated on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "kvb/emu/launch.h"

namespace py = pybind11;

namespace {

// An array argument is (address, nbytes, readonly).  What a kernel declares const is read-only, too.
kvb::emu::Argument array(const py::tuple& span, const kvb::Parameter& parameter) {
  kvb::emu::Argument argument;
  argument.array = reinterpret_cast<kvb::emu::Byte*>(span[0].cast<uintptr_t>());
  argument.size = span[1].cast<size_t>();
  argument.read_only = span[2].cast<bool>() || !parameter.is_writable;
  return argument;
}

void launch(const std::string& name, kvb::Sizes grid, kvb::Sizes block, const py::sequence& args, size_t shared_bytes,
            kvb::u64 seed, bool ftz, bool cooperative) {
  const kvb::ExportedKernel& kernel = kvb::find_kernel(name);
  kvb::check_argument_count(kernel, args.size());
  std::vector<kvb::emu::Argument> arguments;
  for (size_t i = 0; i < args.size(); ++i) {
    const kvb::Parameter& parameter = kernel.parameters[i];
    const py::object value = args[i];
    if (py::isinstance<py::bytes>(value)) {
      arguments.emplace_back();
      arguments.back().scalar = kvb::scalar_bytes(kernel, i, value.cast<std::string>());
    } else if (!parameter.is_pointer) {
      throw kvb::argument_error(kernel, i, "the bytes of a scalar");
    } else if (value.is_none()) {
      arguments.emplace_back();
    } else if (py::isinstance<py::tuple>(value) && py::len(value) == 3) {
      arguments.push_back(array(value, parameter));
    } else {
      throw kvb::argument_error(kernel, i, "(address, nbytes, readonly) or None");
    }
  }
  kvb::emu::run({&kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes, seed, ftz,
                 cooperative}, arguments);
}

}  // namespace

PYBIND11_MODULE(_simt, module) {
  module.doc() = "The kernels of kvbench.cuda_src compiled for the CPU: one fiber per CUDA thread, for tests.";
  module.def("kernels", &kvb::list_kernels, "[(name, tested limit of registers per thread)]");
  module.attr("cooperative_threads") = kvb::emu::kCooperativeThreads;
  // The GIL stays held: there is one emulated machine per process.
  module.def("launch", &launch, py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("args"),
             py::arg("shared_bytes") = 0, py::arg("seed") = 0, py::arg("ftz") = false, py::arg("cooperative") = false,
             "Run a grid to its end on guarded copies of the arrays.\n\n"
             "args: bytes (a scalar, little endian), (address, nbytes, readonly) (an array) or None (a null pointer).\n"
             "seed: 0 runs threads in order, any other number draws the schedule.  ftz: flush subnormals to zero.\n"
             "cooperative: blocks may wait for each other; they have at most cooperative_threads threads.\n"
             "Raises RuntimeError naming kernel, block and thread at the first fault; the arrays are then unchanged.");
}
