// Runs recorded launches again: replay FILE SEED...
//
// A program without Python, to be built with a sanitizer together with the kernels.  Every launch of the file runs once
// under every seed, on its own copy of the recorded arrays.  Exit status: 0 if all launches ended, 1 if the emulator
// reported a fault, 2 for a file that cannot be read; a sanitizer's report ends the program with its own status.
//
// File (tests/emulator/__init__.py writes it; integers little endian):
//   launch    u32 length, kernel name; u32 grid[3], block[3]; u64 dynamic shared memory; u8 cooperative; u32 number of
//             arguments
//   argument  u8 kind: 0 null pointer, 1 scalar, 2 array, 3 read-only array; u64 size; the bytes
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "kvb/emu/launch.h"

namespace {

struct Reader {
  std::ifstream file;

  bool at_end() { return file.peek() == std::ifstream::traits_type::eof(); }
  template <class T>
  T read() {
    T value{};
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    check();
    return value;
  }
  std::string bytes(size_t size) {
    std::string text(size, '\0');
    file.read(text.data(), std::streamsize(size));
    check();
    return text;
  }
  void check() const {
    if (file) return;
    std::fprintf(stderr, "replay: the file ends in the middle of a launch\n");
    std::exit(2);
  }
};

struct Recorded {
  std::string kernel;
  unsigned grid[3], block[3];
  size_t shared_bytes;
  bool cooperative;
  struct Value {
    unsigned char kind;
    std::string bytes;
  };
  std::vector<Value> arguments;
};

Recorded read_launch(Reader& reader) {
  Recorded launch;
  launch.kernel = reader.bytes(reader.read<unsigned>());
  for (unsigned& n : launch.grid) n = reader.read<unsigned>();
  for (unsigned& n : launch.block) n = reader.read<unsigned>();
  launch.shared_bytes = reader.read<unsigned long long>();
  launch.cooperative = reader.read<unsigned char>();
  launch.arguments.resize(reader.read<unsigned>());
  for (Recorded::Value& argument : launch.arguments) {
    argument.kind = reader.read<unsigned char>();
    argument.bytes = reader.bytes(reader.read<unsigned long long>());
  }
  return launch;
}

void replay(const Recorded& recorded, const kvb::ExportedKernel& kernel, kvb::u64 seed) {
  std::vector<Recorded::Value> values = recorded.arguments;   // what the kernel writes is thrown away
  std::vector<kvb::emu::Argument> arguments(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].kind == 1) arguments[i].scalar = values[i].bytes;
    if (values[i].kind >= 2) {
      arguments[i].array = reinterpret_cast<kvb::emu::Byte*>(values[i].bytes.data());
      arguments[i].size = values[i].bytes.size();
      arguments[i].read_only = values[i].kind == 3;
    }
  }
  const dim3 grid(recorded.grid[0], recorded.grid[1], recorded.grid[2]);
  const dim3 block(recorded.block[0], recorded.block[1], recorded.block[2]);
  kvb::emu::run({&kernel, grid, block, recorded.shared_bytes, seed, false, recorded.cooperative}, arguments);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: replay FILE SEED...\n"), 2;
  Reader reader{std::ifstream(argv[1], std::ios::binary)};
  if (!reader.file) return std::fprintf(stderr, "replay: cannot read %s\n", argv[1]), 2;
  int launches = 0;
  for (; !reader.at_end(); ++launches) {
    const Recorded recorded = read_launch(reader);
    const kvb::ExportedKernel* kernel = kvb::ExportedKernel::find(recorded.kernel);
    if (!kernel) return std::fprintf(stderr, "replay: no kernel %s\n", recorded.kernel.c_str()), 2;
    for (int i = 2; i < argc; ++i) {
      try {
        replay(recorded, *kernel, std::strtoull(argv[i], nullptr, 10));
      } catch (const kvb::emu::Error& error) {
        return std::fprintf(stderr, "replay: seed %s: %s\n", argv[i], error.what()), 1;
      }
    }
  }
  std::printf("%d launches, %d schedules each\n", launches, argc - 2);
}
