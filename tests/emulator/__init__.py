"""Build what the emulator's own tests run: modules of test kernels, and sanitized programs that replay launches."""
import importlib.util
import itertools
import struct
from pathlib import Path

from kvbench.bindings import toolchain

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INCLUDE, BINDINGS = ROOT / "cuda_src" / "include", ROOT / "bindings"
CACHE = ROOT / "build" / "objects"

SANITIZERS = {
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}


def load_module(*sources: str):
    """The module kvbench.bindings._simt, with the kernels of tests/emulator/<sources> instead of cuda_src."""
    import sysconfig

    import pybind11

    kernels = [toolchain.emulation_step(HERE / name, [INCLUDE]) for name in sources]
    host = toolchain.emulation_step(BINDINGS / "simt.cpp", [INCLUDE, sysconfig.get_path("include"), pybind11.get_include()])
    path = _link([*kernels, host], "_simt-" + "-".join(Path(name).stem for name in sources), (), ["-shared"], ".so")
    spec = importlib.util.spec_from_file_location("_simt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_replay(sanitizer: str, sources: list[Path]) -> Path:
    """The program replay.cpp with the kernels of `sources`, built with flags of SANITIZERS."""
    flags = SANITIZERS[sanitizer]
    steps = [toolchain.emulation_step(source, [INCLUDE], flags) for source in (HERE / "replay.cpp", *sources)]
    return _link(steps, f"replay-{sanitizer}", flags, [], "")


def _link(steps, name: str, flags, options: list[str], suffix: str) -> Path:
    objects = toolchain.compile_all(steps, toolchain.headers_under(INCLUDE, BINDINGS), CACHE)
    # Objects are named after their content, and so is what is made of them.
    target = CACHE / f"{name}-{toolchain.digest(str(path).encode() for path in objects)}{suffix}"
    if not target.exists():
        partial = target.with_suffix(f".{next(_unique)}{suffix}")
        toolchain.run([toolchain.find_cxx(), *flags, *options, *map(str, objects), "-o", str(partial)])
        partial.replace(target)   # atomic: parallel test processes may build the same
    return target


_unique = (f"{__import__('os').getpid()}-{n}" for n in itertools.count())
