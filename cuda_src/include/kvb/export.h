// The kernel instances of one module, collected by static registration: KVB_EXPORT in kvb/device.cuh.
#pragma once
#include <algorithm>
#include <cctype>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(KVB_EMULATE)
#include "kvb/emu/fiber.h"
#endif

namespace kvb {

struct Parameter {
  size_t size;
  bool is_pointer, is_writable;   // writable: pointer to something not const
};

class ExportedKernel {
 public:
  template <class... Args>
  ExportedKernel(const char* text, int registers, void (*kernel)(Args...))
      : name(canonical(text)),
        registers(registers),
        parameters{Parameter{sizeof(Args), std::is_pointer<Args>::value,
                             std::is_pointer<Args>::value && !std::is_const<std::remove_pointer_t<Args>>::value}...},
        address(reinterpret_cast<void (*)()>(kernel)),
        next_(first_) {
#if defined(KVB_EMULATE)
    invoke_ = [](void (*kernel)(), void** values) KVB_EMU_OWN {
      call(reinterpret_cast<void (*)(Args...)>(kernel), values, std::index_sequence_for<Args...>{});
    };
#endif
    first_ = this;
  }
  ExportedKernel(const ExportedKernel&) = delete;

  const std::string name;   // "kvb::some_kernel<float, 128>"
  const int registers;      // tested limit per thread
  const std::vector<Parameter> parameters;
  void (*const address)();  // nvcc: the host stub, a handle for cudaLaunchKernel

#if defined(KVB_EMULATE)
  // Runs the kernel's body for one thread; values[i] points to argument i, as for cuLaunchKernel.
  KVB_EMU_OWN void invoke(void** values) const { invoke_(address, values); }
#endif

  // The instance of that name whatever its spacing, or nullptr.
  static const ExportedKernel* find(const std::string& name) {
    const std::string wanted = canonical(name);
    for (const ExportedKernel* k = first_; k; k = k->next_)
      if (k->name == wanted) return k;
    return nullptr;
  }
  static std::vector<const ExportedKernel*> all() {
    std::vector<const ExportedKernel*> kernels;
    for (const ExportedKernel* k = first_; k; k = k->next_) kernels.push_back(k);
    std::sort(kernels.begin(), kernels.end(), [](const auto* a, const auto* b) { return a->name < b->name; });
    return kernels;
  }

 private:
  // Spaces stay only between two words ("unsigned int"); one follows each comma.
  static std::string canonical(const std::string& text) {
    auto in_word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
    std::string name;
    bool space = false;
    for (char c : text) {
      if (std::isspace(static_cast<unsigned char>(c))) {
        space = true;
        continue;
      }
      if (space && !name.empty() && in_word(name.back()) && in_word(c)) name += ' ';
      name += c;
      if (c == ',') name += ' ';
      space = false;
    }
    return name;
  }
#if defined(KVB_EMULATE)
  template <class... Args, size_t... I>
  KVB_EMU_OWN static void call(void (*kernel)(Args...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<Args*>(values[I])...);
  }
  void (*invoke_)(void (*)(), void**);
#endif
  const ExportedKernel* next_;
  static inline const ExportedKernel* first_ = nullptr;
};

}  // namespace kvb
