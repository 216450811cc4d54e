"""Find the compilers and CUDA headers, and compile the kernels with them. Used by setup.py and by the tests.

Imports nothing of kvbench: setup.py loads this file before the package exists.
"""
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Flags for CUDA sources and their hosts as C++:
#   -fno-strict-aliasing      kernels reinterpret memory (uint4 over halves); CUDA compilers allow it
#   -ffp-contract=off         no fused multiply-add that the source does not ask for
#   -fvisibility=hidden       inline variables are GNU-unique symbols: the loader would merge those of all modules
#   -fstack-clash-protection  a large frame touches every page, so that it cannot jump over a stack's guard page
CXX_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off",
             "-fstack-clash-protection", "-Wno-unknown-pragmas", "-DKVB_EMULATE")
# Locals that are read before they are written show a pattern instead of what happens to be there.
PLAIN_FLAGS = ("-O2", "-ftrivial-auto-var-init=pattern")

# GPU generations that a build without a GPU at hand serves; the newest also as PTX, for those to come.
DEFAULT_ARCHITECTURES = (80, 90, 100)


class Missing(RuntimeError):
    """Something that a build needs is not on this machine; the message says what and how to get it."""


class CompileError(RuntimeError):
    """A compiler refused a source; the message says what it said."""


def find_cxx() -> str:
    """The C++ compiler: $CXX or g++."""
    if not sys.platform.startswith("linux"):
        raise Missing("kvbench compiles its extension modules on Linux only")
    name = os.environ.get("CXX") or "g++"
    if path := shutil.which(name):
        return path
    raise Missing(f"no C++ compiler ({name}) when kvbench was installed: install g++ and reinstall kvbench")


def find_nvcc() -> str:
    """nvcc from $CUDA_HOME, $CUDA_PATH or the PATH; KVBENCH_CUDA=0 forbids it."""
    if os.environ.get("KVBENCH_CUDA") == "0":
        raise Missing("kvbench was installed with KVBENCH_CUDA=0: reinstall it without")
    homes = [os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if path := shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", os.defpath)])):
        return path
    raise Missing(
        "no nvcc when kvbench was installed: install a CUDA toolkit (12.3 or newer), put nvcc on the PATH and "
        "reinstall kvbench"
    )


def toolkit_root(nvcc: str) -> Path:
    """Where the toolkit of an nvcc lies; nvcc may be a script, so it is asked."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    if top := re.search(r"^#\$ TOP=(.*)$", plan, re.M):
        return Path(top[1].strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def find_cuda_headers() -> list[Path]:
    """Folders that together provide cuda_fp16.h and what it includes: a toolkit's, or those of header wheels."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    try:
        roots.append(toolkit_root(find_nvcc()))
    except Missing:
        pass
    sets = [[root / "include", root / "include" / "cccl"] for root in roots]
    # CUDA 13 wheels share one folder, CUDA 12 wheels have one each.
    sets += [[folder, folder / "cccl"] for p in sys.path for folder in sorted(Path(p).glob("nvidia/cu*/include"))]
    sets += [sorted(Path(p).glob("nvidia/cuda_*/include")) for p in sys.path]
    for folders in sets:
        if all(any((folder / name).is_file() for folder in folders)
               for name in ("cuda_fp16.h", "crt/host_defines.h", "nv/target")):
            return [folder for folder in folders if folder.is_dir()]
    raise Missing("no CUDA headers when kvbench was installed: install nvidia-cuda-runtime, nvidia-cuda-crt and "
                  "nvidia-cuda-cccl (or a CUDA toolkit) and reinstall kvbench")


def gpu_architectures(nvcc: str) -> list[str]:
    """The -gencode options: $KVBENCH_CUDA_ARCHS ("80,90", "native"), else the GPUs present, else the defaults."""
    asked = os.environ.get("KVBENCH_CUDA_ARCHS", "")
    numbers = [re.sub(r"^(sm_|compute_)?|\.", "", text) for text in re.split(r"[\s,;]+", asked) if text]
    if not numbers or numbers == ["native"]:
        present = _present_architectures()
        if not present and numbers:
            raise Missing("KVBENCH_CUDA_ARCHS=native, but nvidia-smi shows no GPU: name the targets, as 80,90")
        if present:
            return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in present]
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        numbers = [str(number) for number in DEFAULT_ARCHITECTURES if f"compute_{number}" in known]
        if not numbers:
            raise Missing(
                f"{nvcc} supports none of the GPU generations {DEFAULT_ARCHITECTURES}: install CUDA 12.3 or newer"
            )
    options = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*options, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def _present_architectures() -> list[str]:
    """Compute capabilities of this machine's GPUs, as ["90"]; empty without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted({line.replace(".", "") for line in lines if re.fullmatch(r"\d+\.\d+", line)})


@dataclass(frozen=True)
class Step:
    """One source compiled to an object by `command -I includes -isystem system_includes -c source`."""

    command: tuple[str, ...]
    source: Path
    includes: tuple[Path, ...]
    system_includes: tuple[Path, ...] = ()

    def compile(self, output: Path) -> list[str]:
        return [*self.command, *(f"-I{folder}" for folder in self.includes),
                *(f"-isystem{folder}" for folder in self.system_includes), "-c", str(self.source), "-o", str(output)]

    def digest(self, project_headers: list[Path]) -> str:
        """Of all that decides the object: compiler, flags, source and headers, wherever the folders lie."""
        version = subprocess.run([self.command[0], "--version"], capture_output=True).stdout
        landmarks = [folder / name for folder in (*self.includes, *self.system_includes) for name in VERSIONED_HEADERS]
        files = [self.source, *project_headers, *filter(Path.is_file, landmarks)]
        return digest([version, "\0".join(self.command).encode(), *(file.read_bytes() for file in files)])


# One header of each foreign library that changes with its version, in place of all of its headers.
VERSIONED_HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda_runtime_api.h", "patchlevel.h", "pybind11/detail/common.h")


def emulation_step(source: Path, includes: list[Path], flags=PLAIN_FLAGS) -> Step:
    """Compile a .cu or .cpp for the emulator. includes: the kernels' own include folders, then any others."""
    language = ("-x", "c++") if source.suffix == ".cu" else ()
    return Step(
        (find_cxx(), *CXX_FLAGS, *flags, *language), source, tuple(map(Path, includes)), tuple(find_cuda_headers())
    )


def compile_all(steps: list[Step], project_headers: list[Path], cache: Path) -> list[Path]:
    """Objects of all steps, compiled in parallel; those of known sources, headers, flags and compiler are reused."""

    def compile_one(step: Step) -> Path:
        return make(cache / f"{step.source.stem}-{step.digest(project_headers)}.o", step.compile)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, steps))


def digest(parts) -> str:
    """A name for the content of byte strings."""
    key = hashlib.sha256()
    for part in parts:
        key.update(hashlib.sha256(part).digest())
    return key.hexdigest()[:20]


def make(target: Path, command) -> Path:
    """Run command(output) to make a file that is not there yet; when processes want the same file, one makes it."""
    if target.exists():
        return target
    import fcntl   # absent where find_cxx() has refused already

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_name("partial-" + target.name)
            run(command(partial))
            partial.replace(target)
    return target


def run(command: list[str]) -> None:
    """Run a compiler; CompileError with the beginning of its output, where the first error is, if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stdout[:8000]}")


def headers_under(*folders: Path) -> list[Path]:
    """All headers of the project's own include folders: each counts for the cache of objects."""
    return sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in (".h", ".cuh"))
