// What both modules do with a kernel's name and arguments before a launch.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "kvb/export.h"

namespace kvb {

using Sizes = std::array<unsigned, 3>;   // of a grid or a block

inline const ExportedKernel& find_kernel(const std::string& name) {
  if (const ExportedKernel* kernel = ExportedKernel::find(name)) return *kernel;
  throw pybind11::value_error("no kernel " + name + " in this module: its file in cuda_src lacks a KVB_EXPORT line, or "
                              "kvbench was not rebuilt since");
}

inline std::vector<std::pair<std::string, int>> list_kernels() {
  std::vector<std::pair<std::string, int>> list;
  for (const ExportedKernel* kernel : ExportedKernel::all()) list.emplace_back(kernel->name, kernel->registers);
  return list;
}

inline void check_argument_count(const ExportedKernel& kernel, size_t given) {
  if (given != kernel.parameters.size())
    throw pybind11::value_error(kernel.name + ": expected " + std::to_string(kernel.parameters.size()) +
                                " arguments, got " + std::to_string(given));
}

inline pybind11::value_error argument_error(const ExportedKernel& kernel, size_t position,
                                            const std::string& expected) {
  return pybind11::value_error(kernel.name + ": argument " + std::to_string(position) + ": expected " + expected);
}

inline std::string scalar_bytes(const ExportedKernel& kernel, size_t position, std::string bytes) {
  const Parameter& parameter = kernel.parameters[position];
  if (!parameter.is_pointer && bytes.size() == parameter.size) return bytes;
  const auto scalar_of = [](size_t size) { return "a scalar of " + std::to_string(size) + " bytes"; };
  throw argument_error(kernel, position, (parameter.is_pointer ? "a pointer" : scalar_of(parameter.size)) + ", got " +
                                             scalar_of(bytes.size()));
}

}  // namespace kvb
