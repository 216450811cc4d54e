"""Build what the emulator's own tests run: modules of test kernels, and sanitized programs that replay launches."""
import importlib.util
import struct
import sysconfig
from pathlib import Path

import numpy as np
import pybind11

from kvbench import loaders
from kvbench.bindings import toolchain

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INCLUDE, BINDINGS = ROOT / "cuda_src" / "include", ROOT / "bindings"
CACHE = ROOT / "build" / "objects"

# -g1 is enough for file and line.  Null pointers are left to AddressSanitizer: that check costs much compile time.
SANITIZERS = {
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}


def load_module(*sources: str):
    """The module kvbench.bindings._simt, with the kernels of tests/emulator/<sources> instead of cuda_src."""
    strict = (*toolchain.PLAIN_FLAGS, "-Wall", "-Wextra", "-Werror")
    kernels = [toolchain.emulation_step(HERE / name, [INCLUDE], strict) for name in sources]
    host = toolchain.emulation_step(
        BINDINGS / "simt.cpp", [INCLUDE, sysconfig.get_path("include"), pybind11.get_include()]
    )
    stem = "_".join(Path(name).stem for name in sources)
    path = _link([*kernels, host], f"_simt-{stem}", (), ["-shared"], ".so")
    spec = importlib.util.spec_from_file_location(f"{stem}._simt", path)   # pybind11 keeps one module per full name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulator:
    """Runs test kernels in the emulator: run(name, grid, block, arguments...) on NumPy arrays, in place.

    Read-only arrays stand for arrays that the kernel may not write; scalars are NumPy scalars of the kernel's own type.
    """

    def __init__(self, *sources: str):
        self.module = load_module(*sources)

    def __call__(self, name, grid, block, *arguments, shared=0, seed=0, ftz=False, cooperative=False):
        packed = [None if a is None else (a.ctypes.data, a.nbytes, not a.flags.writeable) if isinstance(a, np.ndarray)
                  else a.tobytes() for a in arguments]
        self.module.launch(f"kvb::{name}", three(grid), three(block), packed, shared, seed, ftz, cooperative)


def compile_cubin(source: str, architecture: str, *kernels: str) -> tuple[bytes, dict[str, str]]:
    """(cubin, {kernel: lowered name}) of test kernels, all or the given ones, by NVRTC; needs CuPy but no GPU.

    Without CuPy's own compile options, which would flush subnormals.
    """
    from cupy.cuda import nvrtc

    names = [f"kvb::{name}" for name in kernels] or [name for name, _ in load_module(source).kernels()]
    program = nvrtc.createProgram((HERE / source).read_text(), source, (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        includes = [f"-I{folder}" for folder in (INCLUDE, *toolchain.find_cuda_headers())]
        try:
            nvrtc.compileProgram(program, ("-std=c++17", f"-arch={architecture}", *includes))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program)) from error
        return nvrtc.getCUBIN(program), {name: nvrtc.getLoweredName(program, name) for name in names}
    finally:
        nvrtc.destroyProgram(program)


class Gpu:
    """The same as Emulator on a GPU, for all kernels or the given ones; there schedules and flushing mean nothing."""

    def __init__(self, source: str, *kernels: str):
        import cupy
        from cupy.cuda import function

        self.cupy = cupy
        cubin, lowered = compile_cubin(source, f"sm_{cupy.cuda.Device().compute_capability}", *kernels)
        self.module = function.Module()
        self.module.load(cubin)
        self.kernels = {name: self.module.get_function(symbol) for name, symbol in lowered.items()}

    def __call__(self, name, grid, block, *arguments, shared=0, seed=0, ftz=False, cooperative=False):
        on_device = [
            self.cupy.asarray(a.view(np.uint8).reshape(-1)) if isinstance(a, np.ndarray) else a for a in arguments
        ]
        packed = [np.uint64(0 if a is None else a.data.ptr) if a is None or isinstance(a, self.cupy.ndarray) else a
                  for a in on_device]
        kernel = self.kernels[f"kvb::{name}"]
        if cooperative:
            loaders._launch_with(loaders._launch_attributes(False, True), kernel.ptr, three(grid), three(block), packed,
                                 shared, 0)
        else:
            kernel(three(grid), three(block), tuple(packed), shared_mem=shared)
        for host, device in zip(arguments, on_device):
            if isinstance(host, np.ndarray) and host.flags.writeable:
                host.view(np.uint8).reshape(-1)[...] = device.get()


def three(sizes) -> tuple[int, int, int]:
    sizes = sizes if isinstance(sizes, tuple) else (sizes,)
    return (*sizes, 1, 1)[:3]


def build_replay(sanitizer: str, sources: list[Path]) -> Path:
    """The program replay.cpp with the kernels of `sources`, built with flags of SANITIZERS."""
    flags = SANITIZERS[sanitizer]
    steps = [toolchain.emulation_step(source, [INCLUDE], flags) for source in (HERE / "replay.cpp", *sources)]
    return _link(steps, f"replay-{sanitizer}", flags, [], "")


def write_launches(launches: list[dict], path: Path) -> None:
    """Write what kvbench.loaders.record() yields in the format that replay.cpp reads."""
    with open(path, "wb") as file:
        for launch in launches:
            name = launch["kernel"].encode()
            file.write(struct.pack("<I", len(name)) + name)
            file.write(
                struct.pack("<6IQ?I", *launch["grid"], *launch["block"], launch["shared_bytes"],
                            launch["cooperative"], len(launch["args"]))
            )
            for argument in launch["args"]:
                if argument is None:
                    kind, content = 0, b""
                elif isinstance(argument, bytes):
                    kind, content = 1, argument
                else:
                    snapshot, readonly = argument
                    kind, content = 3 if readonly else 2, snapshot.tobytes()
                file.write(struct.pack("<BQ", kind, len(content)) + content)


def _link(steps, name: str, flags, options: list[str], suffix: str) -> Path:
    objects = toolchain.compile_all(steps, toolchain.headers_under(INCLUDE, BINDINGS), CACHE)
    # Objects are named after their content, and so is what is made of them.
    target = CACHE / f"{name}-{toolchain.digest(str(path).encode() for path in objects)}{suffix}"
    return toolchain.make(
        target, lambda output: [toolchain.find_cxx(), *flags, *options, *map(str, objects), "-o", str(output)]
    )
