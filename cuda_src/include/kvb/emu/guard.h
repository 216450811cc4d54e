// Memory between guard pages, so that an access outside it faults where it happens.
//
//   | slot: inaccessible ... | low: canary bytes | data[size] | canary, at most 15 bytes | high: inaccessible page |
//
// The data ends at the last possible byte: one element past the end faults.  What page granularity leaves accessible
// around it is filled with canary bytes (NaN as f16, bf16, f32 and f64) that are compared later; AddressSanitizer
// knows it as poisoned.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#include "kvb/emu/fiber.h"

namespace kvb::emu {

using Byte = unsigned char;

KVB_EMU_OWN inline size_t page_size() {
  static const size_t size = size_t(sysconf(_SC_PAGESIZE));
  return size;
}
constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Inaccessible address space; nullptr when there is none left.
KVB_EMU_OWN inline Byte* reserve(size_t size) {
  void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<Byte*>(p);
}

struct Guarded {
  Byte* data = nullptr;
  size_t size = 0;
  Byte *low = nullptr, *high = nullptr;   // the accessible pages

  static Byte canary(const Byte* p) { return reinterpret_cast<uintptr_t>(p) & 1 ? 0xFF : 0xFE; }

  // Address space that open() needs; the guard before the data is at least `gap` bytes.
  KVB_EMU_OWN static size_t slot_size(size_t size, size_t gap) {
    return round_up(gap, page_size()) + round_up(size + 16, page_size()) + page_size();
  }
  // Places `size` bytes in reserved address space, their address congruent to `misalignment` modulo 16.
  KVB_EMU_OWN bool open(Byte* slot, size_t slot_bytes, size_t bytes, size_t misalignment = 0) {
    size = bytes;
    high = slot + slot_bytes - page_size();
    data = high - round_up(size + misalignment, 16) + misalignment;
    low = data - reinterpret_cast<uintptr_t>(data) % page_size();
    if (low < high && mprotect(low, size_t(high - low), PROT_READ | PROT_WRITE)) return false;
    // volatile: a call of memset would be the kernel's store to ThreadSanitizer.
    for (volatile Byte* p = low; p < data; ++p) *p = canary(const_cast<Byte*>(p));
    for (volatile Byte* p = data + size; p < high; ++p) *p = canary(const_cast<Byte*>(p));
    KVB_EMU_ASAN(__asan_poison_memory_region(low, size_t(data - low)));
    KVB_EMU_ASAN(__asan_unpoison_memory_region(data, size));
    KVB_EMU_ASAN(__asan_poison_memory_region(data + size, size_t(high - data) - size));
    return true;
  }
  KVB_EMU_OWN void close() {
    if (low == high) return;
    KVB_EMU_ASAN(__asan_unpoison_memory_region(low, size_t(high - low)));
    mprotect(low, size_t(high - low), PROT_NONE);
  }
  KVB_EMU_OWN void make_read_only() const {
    if (low < high) mprotect(low, size_t(high - low), PROT_READ);
  }
  // The first of the overwritten bytes that lie nearest to the data, or nullptr.  AddressSanitizer has reported such a
  // write already, at the kernel's line.
  KVB_EMU_OWN const Byte* damaged() const {
    KVB_EMU_ASAN(return nullptr);
    for (const Byte* p = data + size; p < high; ++p)
      if (*p != canary(p)) return p;
    const Byte* p = data;
    while (p > low) {
      uint64_t word;
      if (reinterpret_cast<uintptr_t>(p) % 8 == 0) {   // low is page-aligned: whole words remain
        __builtin_memcpy(&word, p - 8, 8);
        if (word == 0xFFFEFFFEFFFEFFFEull) {
          p -= 8;
          continue;
        }
      }
      --p;
      if (*p == canary(p)) continue;
      while (p > low && p[-1] != canary(p - 1)) --p;
      return p;
    }
    return nullptr;
  }
  size_t distance(const Byte* p) const {
    return p < data ? size_t(data - p) : p < data + size ? 0 : size_t(p - data) - size + 1;
  }
};

}  // namespace kvb::emu
