"""Every kernel instance compiles to machine code for three GPU generations, without spilling and within its register
limit.

NVRTC needs no GPU.  The limits stand beside the instances, in the KVB_EXPORT lines of cuda_src/*.cu.
"""
import ctypes
import pathlib
import re
import struct
import subprocess

import pytest

from kvbench import loaders
from kvbench.bindings import missing
from kvbench.bindings.toolchain import find_cuda_headers, find_cxx
from kvbench.ops import selection

nvrtc = pytest.importorskip("cupy.cuda", reason="NVRTC comes with CuPy").nvrtc   # no module that can be imported
pytestmark = pytest.mark.skipif(missing("_simt") is not None, reason=str(missing("_simt")))

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LOG = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                 r"(\d+) bytes spill loads.*?Used (\d+) registers", re.S)


def instances():
    """{stem: {name expression: register limit}}, from the list that the emulator was built with."""
    from kvbench.bindings import _simt

    stems = sorted((path.stem for path in (pathlib.Path(__file__).parents[1] / "cuda_src").glob("*.cu")),
                   key=len, reverse=True)
    found = {}
    for name, limit in _simt.kernels():   # a kernel's name begins with its stem
        found.setdefault(next(stem for stem in stems if name.startswith(f"kvb::{stem}_")), {})[name] = limit
    return found


def sections(cubin):
    """{name: (offset, size)} of a cubin."""
    table, entry, count, names = (*struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HHH", cubin, 58))
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    starts = [headers[names][4] + header[0] for header in headers]
    return {cubin[start:cubin.index(b"\0", start)].decode(): header[4:6] for start, header in zip(starts, headers)}


def instructions(cubin, section):
    """The first eight bytes of each instruction of one section of a cubin, as integers."""
    offset, size = sections(cubin)[section]
    return [word for word, _ in struct.iter_unpack("<QQ", cubin[offset:offset + size])]


def refused_copies(cubin, lowered):
    """Asynchronous copies in the form that takes a part of the shared address from a uniform register.

    ptxas 13.0 may choose it together with a cache hint; a GPU of generation 9 stops at such a one with "illegal
    instruction".  Bits 0 to 11 of an instruction are its operation and the form of its operands: 0xdae, not 0xfae.
    """
    return sum(word & 0xFFF == 0xDAE for word in instructions(cubin, f".text.{lowered}"))


def compile_cubin(stem, names, architecture):
    """{name: (registers, stack bytes, spilled bytes, refused copies, bytes in front of dynamic shared memory)};
    RuntimeError with the compiler's log."""
    from kvbench.bindings.toolchain import Missing, find_cuda_headers

    try:
        headers = [f"-I{folder}" for folder in find_cuda_headers()]
    except Missing as error:
        pytest.skip(str(error))
    program = nvrtc.createProgram(loaders.source(stem), f"{stem}.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*loaders.nvrtc_options(), f"-arch={architecture}", "--ptxas-options=-v",
                                           *headers))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program)) from error
        costs = {m[1]: (int(m[5]), int(m[2]), int(m[3]) + int(m[4]))
                 for m in LOG.finditer(nvrtc.getProgramLog(program))}
        lowered = {name: nvrtc.getLoweredName(program, name) for name in names}
        cubin = nvrtc.getCUBIN(program)
        found = sections(cubin)
        return {name: (*costs[lowered[name]], refused_copies(cubin, lowered[name]),
                       found.get(f".nv.shared.{lowered[name]}", (0, 0))[1]) for name in names}
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", sorted(instances()) if missing("_simt") is None else [])
def test_compiles_within_its_limits(stem, architecture):
    limits = instances()[stem]
    for name, (registers, stack, spilled, refused, _) in compile_cubin(stem, limits, architecture).items():
        assert spilled == 0 and stack == 0, f"{name} on {architecture}: {spilled} bytes spilled, {stack} bytes of stack"
        assert registers <= limits[name], f"{name} on {architecture}: {registers} registers, limit {limits[name]}"
        assert not refused, f"{name} on {architecture}: {refused} copies that the GPU refuses"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem, name", [
    ("attention", "kvb::attention_decode_kernel<__half, 128, 8>"),
    ("attention", "kvb::attention_sparse_kernel<__half, 128, 8>"), ("kivi", "kvb::kivi_attention_kernel<128, 8, 2, 2>"),
    ("turboquant", "kvb::turboquant_attention_kernel<128, 8, 3, 3>"),
    ("block_gtq", "kvb::block_gtq_attention_kernel<128, 8, 3>")])
def test_rings_begin_at_a_line_of_shared_memory(stem, name, architecture):
    """Behind static variables, too: 16 bytes further on, all that arrives takes two lines, and 6 % more time."""
    static = compile_cubin(stem, [name], architecture)[name][4]
    assert static and static % 128 == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_there_is_room_beside_static_variables(head_dim):
    name = f"kvb::rabitq_top_p_kernel<{head_dim}>"
    assert compile_cubin("rabitq", [name], "sm_90")[name][4] <= selection.TOP_P_STATIC


def test_a_refused_copy_is_found(monkeypatch):
    """Every asynchronous copy of a kernel, rewritten to the form that takes a uniform register."""
    name, get_cubin = "kvb::attention_decode_kernel<__half, 64, 8>", nvrtc.getCUBIN

    def rewritten(program):
        cubin = bytearray(get_cubin(program))
        for at in range(0, len(cubin) - 15, 16):
            if int.from_bytes(cubin[at:at + 2], "little") & 0xFFF == 0xFAE:
                cubin[at + 1] ^= 0x02
        return bytes(cubin)

    assert compile_cubin("attention", [name], "sm_90")[name][3] == 0
    monkeypatch.setattr(nvrtc, "getCUBIN", rewritten)
    assert compile_cubin("attention", [name], "sm_90")[name][3] > 0


def test_a_broken_kernel_does_not_compile(monkeypatch):
    monkeypatch.setattr(loaders, "source",
                        lambda stem: '#include "kvb/device.cuh"\n__global__ void broken() { nothing(); }')
    with pytest.raises(RuntimeError, match="identifier \"nothing\" is undefined"):
        compile_cubin("broken", [], "sm_90")


def test_structures_of_a_launch_with_attributes_are_those_of_the_driver(tmp_path):
    """loaders._launch_with gives the driver its structures without a header."""
    header = next((folder / "cuda.h" for folder in find_cuda_headers() if (folder / "cuda.h").is_file()), None)
    if header is None:
        pytest.skip("no cuda.h among the CUDA headers")
    fields = {"CUlaunchConfig": ("gridDimX", "blockDimX", "sharedMemBytes", "hStream", "attrs", "numAttrs"),
              "CUlaunchAttribute": ("id", "value", "value.cooperative")}
    asked = [f"sizeof({name})" for name in fields] + [
        f"offsetof({name}, {field})" for name, names in fields.items() for field in names]
    asked += ["(size_t)CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
              "sizeof(((CUlaunchAttributeValue*)0)->programmaticStreamSerializationAllowed)",
              "(size_t)CU_LAUNCH_ATTRIBUTE_COOPERATIVE", "sizeof(((CUlaunchAttributeValue*)0)->cooperative)"]
    source, program = tmp_path / "sizes.cpp", tmp_path / "sizes"
    source.write_text("".join(f"#include <{name}>\n" for name in ("cstddef", "cstdio", "initializer_list", "cuda.h"))
                      + "int main() { for (size_t x : {" + ", ".join(asked) + '}) std::printf("%zu ", x); }\n')
    subprocess.run([find_cxx(), "-std=c++17", f"-I{header.parent}", source, "-o", program], check=True)
    known = list(map(int, subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()))
    config, attribute = loaders._LaunchConfig, loaders._LaunchAttribute
    assert known == [ctypes.sizeof(config), ctypes.sizeof(attribute),
                     *(getattr(config, name).offset for name, _ in config._fields_),
                     attribute.id.offset, attribute.value.offset, attribute.value.offset,
                     loaders._PROGRAMMATIC_STREAM_SERIALIZATION.id, attribute.value.size,
                     loaders._COOPERATIVE.id, attribute.value.size]
