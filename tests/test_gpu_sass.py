"""The GPU kernels compiled by NVRTC for each architecture: no spills, and the instructions that make them fast."""
import itertools

import pytest
from gpu_cases import KINDS
from gpu_compiling import compiled, opcodes

from cyflash.gpu.variants import FLAGS, choose

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
OPTION_SETS = ((), ("EDGES",), FLAGS)
KINDS_OF_SIZES = ("float32", "float16", "int8", "int8-float16")  # bfloat16 needs what float16 does
HEAD_DIMS = tuple(range(16, 257, 16))
REGISTERS = 255  # of a thread: two blocks of 128 threads on 65536 registers
SHARED = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120
PRODUCTS = {"float32": ("FFMA",), "float16": ("HMMA.16816.F32",), "bfloat16": ("HMMA.16816.F32.BF16",),
            "int8": ("IMMA.16832.S8.S8", "IMMA.16832.U8.S8"), "int8-float16": ("IMMA.16832.S8.S8", "HMMA.16816.F32"),
            "int8-bfloat16": ("IMMA.16832.S8.S8", "HMMA.16816.F32.BF16")}


def check(arch, kind, D, options, **arguments):
    qk, v, out = KINDS[kind]
    variant = choose(arch, D, qk, v, out, options=options, **arguments)
    built = compiled(variant)
    assert built.spilled == 0, f"{variant}: {built.log}"
    assert built.registers <= REGISTERS
    assert variant.shared_bytes <= SHARED
    return built


@pytest.mark.parametrize("arch, kind", list(itertools.product(ARCHS, KINDS_OF_SIZES)))
def test_no_spills(arch, kind):
    """One of the larger variants for each, another for the next."""
    number = ARCHS.index(arch) + list(KINDS).index(kind)
    D = (128, 256, 64)[number % 3]
    check(arch, kind, D, (FLAGS, ("EDGES",))[number // 3 % 2])


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTION_SETS, ids=len)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_at_all(arch, kind, options):
    for D in HEAD_DIMS:
        check(arch, kind, D, options)
    check(arch, kind, 128, options, aligned=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_opcodes(arch, kind):
    """Products on the units they are meant for, copies that bypass registers, matrices from shared memory."""
    found = opcodes(check(arch, kind, 64, ()).cubin)
    wanted = [*PRODUCTS[kind], "LDGSTS", "MUFU.EX2"]
    if kind != "float32":
        wanted.append("LDSM")
    for name in wanted:
        assert any(opcode.startswith(name) for opcode in found), f"no {name} in {sorted(found)}"
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in found)


def test_other_variants_compile():
    check("sm_80", "float16", 64, (), aligned=False)
    for flag in FLAGS:
        check("sm_90a", "float16", 64, (flag,))
