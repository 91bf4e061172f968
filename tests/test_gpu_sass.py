"""Every GPU kernel compiled by NVRTC for each architecture: no spills, as few registers as its blocks leave it, and the
instructions that make it fast."""
import itertools

import pytest
from gpu_cases import KINDS
from gpu_compiling import compiled, listing, opcodes

from cyflash.gpu.decode import choose_decode
from cyflash.gpu.variants import FLAGS, LONG, choose, turn

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
HALVES = [kind for kind in KINDS if kind != "float32"]
KERNELS = [  # (kernel, kind, arch)
    *(("ffma", "float32", arch) for arch in ARCHS),
    *itertools.product(("mma", "decode"), HALVES, ARCHS),
]
HEAD_DIMS = tuple(range(16, 257, 16))
HOPPER_HEAD_DIMS = (64, 128, 256)  # others are compiled as the next of these
SUBSETS = [options for n in range(len(FLAGS) + 1) for options in itertools.combinations(FLAGS, n)]

BLOCKS = {"ffma.cu": 2, "merge.cu": 4, "turned.cu": 8}  # that share a multiprocessor; macro BLOCKS of the others
SHARED = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120
SHARED_HOPPER = 227 * 1024
PRODUCTS = {"float32": ("FFMA",), "float16": ("HMMA.16816.F32",), "bfloat16": ("HMMA.16816.F32.BF16",),
            "int8": ("IMMA.16832.S8.S8", "IMMA.16832.U8.S8"), "int8-float16": ("IMMA.16832.S8.S8", "HMMA.16816.F32"),
            "int8-bfloat16": ("IMMA.16832.S8.S8", "HMMA.16816.F32.BF16")}
WIDE_PRODUCTS = {"float16": ("HGMMA",), "bfloat16": ("HGMMA",), "int8": ("IGMMA",), "int8-float16": ("IGMMA", "HGMMA"),
                 "int8-bfloat16": ("IGMMA", "HGMMA")}
# Copies by a tensor map, waiting for them, registers that move.
HOPPER = ("UTMALDG.4D", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "USETMAXREG", "MUFU.EX2")
# Copies that bypass registers, matrices from shared memory.
AMPERE = ("LDGSTS.E.BYPASS.LTC128B.128", "LDSM", "MUFU.EX2")


def variants(kernel, kind, arch, D, options, aligned=True, Lq=LONG):
    """What a call launches, None where another kernel takes it."""
    how = dict(options=options, aligned=aligned)
    if kernel == "decode":
        chosen = choose_decode(arch, 1, 8, 1, 1, 1000, D, *KINDS[kind], **how)
        return chosen.split, chosen.merge
    variant = choose(arch, D, *KINDS[kind], mapped=kernel == "hopper", Lq=Lq, **how)
    return (variant,) if variant.source == f"{kernel}.cu" else None


def check(variant):
    """Compile; no spills, and as many registers and bytes as leave room for the blocks that are meant to share them."""
    built = compiled(variant)
    assert built.spilled == 0, f"{variant}: {built.log}"
    if variant.source == "hopper.cu":
        assert built.registers == 168  # 65536 / 384 rounded down to 8: before warpgroups exchange them
        assert "C75" not in built.log  # registers that stay, products in series
        assert variant.shared_bytes <= SHARED_HOPPER
        return built
    blocks = BLOCKS.get(variant.source) or dict(variant.macros)["BLOCKS"]
    assert built.registers <= min(65536 // (variant.threads * blocks) // 8 * 8, 255), f"{variant}: {built.registers}"
    assert variant.shared_bytes <= SHARED
    assert blocks * (variant.shared_bytes + 1024) <= SHARED_HOPPER
    return built


def check_opcodes(built, wanted):
    found = opcodes(built.cubin)
    for name in wanted:
        assert any(opcode.startswith(name) for opcode in found), f"no {name} in {sorted(found)}"
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in found)


def quick(kernel, kind, arch):
    """Not those that get the very source and macros of sm_120 (variants.SMALL), but for one kind each."""
    return arch not in ("sm_86", "sm_89") or kind == {"sm_86": "float16", "sm_89": "int8"}[arch]


def slow_but(wanted, cases):
    return [pytest.param(*case, marks=[] if wanted(*case) else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("kernel, kind, arch", slow_but(quick, KERNELS))
def test_machine_code(kernel, kind, arch):
    """Each kernel for each architecture, with other sizes and options each time."""
    number = ARCHS.index(arch) + list(KINDS).index(kind) + (kernel == "decode")
    options = (FLAGS, ("EDGES",), (), FLAGS[1 + number // 9 :][:1])[number // 3 % 4]
    D, Lq = (128, 256, 64)[number % 3], (LONG, 64)[number // 2 % 2]
    first, *others = [check(one) for one in variants(kernel, kind, arch, D, options, Lq=Lq)]
    check_opcodes(first, (*PRODUCTS[kind], *(("LDGSTS", "MUFU.EX2") if kernel == "ffma" else AMPERE)))
    for one in others:
        check_opcodes(one, ("MUFU.EX2",))


@pytest.mark.parametrize("D", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("kind", HALVES)
def test_machine_code_of_hopper(kind, D):
    taken = [one for options in SUBSETS if (one := variants("hopper", kind, "sm_90a", D, options))]
    if not taken:
        assert (kind, D) == ("int8", 256)  # mma.cu takes it
        return
    (variant,) = taken[(7 * HALVES.index(kind) + 3 * HOPPER_HEAD_DIMS.index(D)) % len(taken)]
    check_opcodes(check(variant), (*WIDE_PRODUCTS[kind], *HOPPER))


def edges_in_turns(kind, D, options):
    """A kernel takes seconds to compile; with EDGES its loop is the same but for a tile at either end."""
    return (HALVES.index(kind) + HOPPER_HEAD_DIMS.index(D) + len(options)) % 2


@pytest.mark.parametrize("kind, D, options", slow_but(
    edges_in_turns, itertools.product(HALVES, HOPPER_HEAD_DIMS, ((), ("EDGES",)))))
def test_softmax_runs_beside_products(kind, D, options):
    """Between the wait for S and that for P V, which were started together, the exponentials of a whole tile."""
    for one in variants("hopper", kind, "sm_90a", D, options) or ():
        code = " ".join(listing(check(one).cubin)).split("WARPGROUP.DEPBAR.LE")
        most = max(part.count("MUFU.EX2") for part in code[1:-1] if "GMMA" not in part)
        assert most >= dict(one.macros)["BLOCK_K"] / 2


def test_other_variants_compile():
    for kernel in ("mma", "decode"):
        check(variants(kernel, "float16", "sm_80", 64, (), aligned=False)[0])
    check(variants("ffma", "float32", "sm_80", 64, (), aligned=False)[0])
    check(turn())


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("EDGES",), FLAGS], ids=len)
@pytest.mark.parametrize("kernel, kind, arch", KERNELS)
def test_all_head_dims(kernel, kind, arch, options):
    for D, Lq, aligned in itertools.product(HEAD_DIMS, (LONG, 64), (True, False)):
        if aligned or D in (64, 128, 256):
            for one in variants(kernel, kind, arch, D, options, aligned, Lq):
                check(one)


@pytest.mark.slow
@pytest.mark.parametrize("kernel, kind, arch", KERNELS)
def test_all_options(kernel, kind, arch):
    """Every set of them, with D = 64, 128 and 256 in turns."""
    for i, options in enumerate(SUBSETS):
        D, Lq = (64, 128, 256)[(i + ARCHS.index(arch)) % 3], (LONG, 64)[i % 2]
        for one in variants(kernel, kind, arch, D, options, Lq=Lq):
            check(one)


@pytest.mark.slow
@pytest.mark.parametrize("D", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("kind", HALVES)
def test_all_of_hopper(kind, D):
    for options in SUBSETS:
        for one in variants("hopper", kind, "sm_90a", D, options) or ():
            check(one)
