"""Build of kvbench: pure Python, plus two optional extension modules made from cuda_src/*.cu.

kvbench.bindings._native   the kernels compiled by nvcc (without nvcc: an empty module whose has_cuda is False)
kvbench.bindings._simt     the kernels compiled by g++ for the emulator; needs NVIDIA's headers, not a GPU

Nothing that is missing stops the installation: the reason is written beside the module, for ``kvbench doctor``.

KVBENCH_CUDA=0               builds without nvcc, even if it is there
KVBENCH_CUDA_ARCHS=80,90     compiles for these GPU generations ("native": those in this machine). Default: the GPUs
                             that nvidia-smi shows; where there are none sm_80, sm_90, sm_100, the last also as PTX
KVBENCH_BUILD_CACHE=FOLDER   keeps compiled objects there instead of build/objects, for repeated builds
CXX                          the C++ compiler, g++ by default
"""
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "bindings"))
import toolchain  # noqa: E402  (this build's own file, importable before kvbench is)

INCLUDE, BINDINGS = ROOT / "cuda_src" / "include", ROOT / "bindings"


class BuildKernels(build_ext):
    """Compiles and links the two modules itself: sources for two compilers, in parallel, with a cache of objects."""

    def build_extension(self, extension):
        module = extension.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.parent / f"{module}.missing.txt"
        for stale in (target, note):
            stale.unlink(missing_ok=True)
        try:
            reason = {"_simt": self.build_simt, "_native": self.build_native}[module](target)
        except (toolchain.Missing, toolchain.CompileError) as error:
            reason = str(error)
        if reason:
            note.write_text(reason + "\n", encoding="utf-8")
            print(f"kvbench: {extension.name} is not complete: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """For editable installs: the modules and notes of this build, and none of an earlier one."""
        built = Path(self.build_lib, "kvbench", "bindings")
        source = Path(self.get_finalized_command("build_py").get_package_dir("kvbench.bindings"))
        for extension in self.extensions:
            module = extension.name.rpartition(".")[2]
            suffix = Path(self.get_ext_filename(extension.name)).name
            for name in (suffix, f"{module}.missing.txt"):
                (source / name).unlink(missing_ok=True)
                if (built / name).exists():
                    self.copy_file(str(built / name), str(source / name))

    def build_simt(self, target: Path) -> None:
        kernels = [toolchain.emulation_step(path, [INCLUDE]) for path in self.kernel_files()]
        module = toolchain.emulation_step(BINDINGS / "simt.cpp", [INCLUDE, *self.python_includes()])
        self.link([*kernels, module], [], target)

    def build_native(self, target: Path) -> str | None:
        """Why there are no CUDA kernels in the module, or None."""
        cxx = toolchain.find_cxx()
        host, includes = (cxx, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"), (INCLUDE, *self.python_includes())
        try:
            nvcc = toolchain.find_nvcc()
            toolkit = toolchain.toolkit_root(nvcc)
            device = (nvcc, "-std=c++17", "-O3", "-DKVB_NATIVE", "-Xcompiler=-fPIC,-fvisibility=hidden",
                      "--threads=0", "--split-compile=0",     # all cores: one file may hold a hundred kernels
                      *toolchain.gpu_architectures(nvcc))
            steps = [toolchain.Step(device, path, (INCLUDE,)) for path in self.kernel_files()]
            steps.append(
                toolchain.Step((*host, "-DKVB_NATIVE"), BINDINGS / "native.cpp", includes, (toolkit / "include",))
            )
            libraries = [f"-L{toolkit / folder}" for folder in ("lib64", "targets/x86_64-linux/lib", "lib")]
            # The static runtime needs no CUDA library, and so no driver, to be imported.
            self.link(steps, [*libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread"], target)
            return None
        except (toolchain.Missing, toolchain.CompileError) as error:
            self.link([toolchain.Step(host, BINDINGS / "native.cpp", includes)], [], target)
            return str(error)

    def link(self, steps, libraries, target: Path) -> None:
        cache = Path(os.environ.get("KVBENCH_BUILD_CACHE") or ROOT / "build" / "objects")
        objects = toolchain.compile_all(steps, toolchain.headers_under(INCLUDE, BINDINGS), cache)
        toolchain.run([toolchain.find_cxx(), "-shared", *map(str, objects), *libraries, "-o", str(target)])

    @staticmethod
    def kernel_files() -> list[Path]:
        return sorted((ROOT / "cuda_src").glob("*.cu"))

    @staticmethod
    def python_includes() -> list[Path]:
        try:
            import pybind11
        except ImportError as error:
            raise toolchain.Missing("no pybind11 when kvbench was installed: install pybind11 and reinstall "
                                    "kvbench") from error
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise toolchain.Missing("no Python.h when kvbench was installed: install python3-dev and reinstall kvbench")
        return [Path(sysconfig.get_path("include")), Path(pybind11.get_include())]


setup(
    packages=[
        *find_packages(include=["kvbench", "kvbench.*"]),
        "kvbench.reference",
        "kvbench.cuda_src",
        "kvbench.bindings",
    ],
    package_dir={
        "kvbench": "kvbench",
        "kvbench.reference": "reference",
        "kvbench.cuda_src": "cuda_src",
        "kvbench.bindings": "bindings",
    },
    include_package_data=False,  # the list below alone decides
    package_data={
        "kvbench": ["data/*"],
        "kvbench.report": ["*.css", "*.js"],
        "kvbench.cuda_src": ["*.cu", "include/**/*"],
        "kvbench.bindings": ["*.cpp", "*.h"],
    },
    ext_modules=[Extension(f"kvbench.bindings.{name}", [], optional=True) for name in ("_native", "_simt")],
    cmdclass={"build_ext": BuildKernels},
)
