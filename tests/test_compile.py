"""Every kernel instance compiles to machine code for three GPU generations, without spilling and within its register
limit.

NVRTC needs no GPU.  The limits stand beside the instances, in the KVB_EXPORT lines of cuda_src/*.cu.
"""
import pathlib
import re
import struct

import pytest

from kvbench import loaders
from kvbench.bindings import missing

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


def instructions(cubin, section):
    """The first eight bytes of each instruction of one section of a cubin, as integers."""
    table, entry, count, names = (*struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HHH", cubin, 58))
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    for name, _, _, _, offset, size in headers:
        start = headers[names][4] + name
        if cubin[start:cubin.index(b"\0", start)].decode() == section:
            return [word for word, _ in struct.iter_unpack("<QQ", cubin[offset:offset + size])]
    raise ValueError(f"no section {section}")


def refused_copies(cubin, lowered):
    """Asynchronous copies in the form that takes a part of the shared address from a uniform register.

    ptxas 13.0 may choose it together with a cache hint; a GPU of generation 9 stops at such a one with "illegal
    instruction".  Bits 0 to 11 of an instruction are its operation and the form of its operands: 0xdae, not 0xfae.
    """
    return sum(word & 0xFFF == 0xDAE for word in instructions(cubin, f".text.{lowered}"))


def compile_cubin(stem, names, architecture):
    """{name: (registers, stack bytes, spilled bytes, refused copies)}; RuntimeError with the compiler's log."""
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
        return {name: (*costs[lowered[name]], refused_copies(cubin, lowered[name])) for name in names}
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", sorted(instances()) if missing("_simt") is None else [])
def test_compiles_within_its_limits(stem, architecture):
    limits = instances()[stem]
    for name, (registers, stack, spilled, refused) in compile_cubin(stem, limits, architecture).items():
        assert spilled == 0 and stack == 0, f"{name} on {architecture}: {spilled} bytes spilled, {stack} bytes of stack"
        assert registers <= limits[name], f"{name} on {architecture}: {registers} registers, limit {limits[name]}"
        assert not refused, f"{name} on {architecture}: {refused} copies that the GPU refuses"


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
