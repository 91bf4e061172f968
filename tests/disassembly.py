"""Instructions of compiled modules, and which of them are above the build that a module is for."""
import functools
import re
import shutil
import subprocess

# Names of instructions beyond SSE2, which every x86-64 has, as far as they have no VEX form that starts with v.
BEYOND_SSE2 = re.compile(
    r"^(pshufb|palignr|pabs[bwd]|phadd|phsub|pmulhrsw|pmaddubsw|psign|haddp|hsubp|addsubp|lddqu|movs[hl]dup|movddup|pblend|blend|"
    r"dpp[sd]|round[ps][sd]|ptest|pmulld|pmuldq|p(max|min)(s[bd]|u[wd])|pmov[sz]x|packusdw|pcmp[eg][qt]q|insertps|extractps|"
    r"pinsr[bdq]|pextr[bdq]|mpsadbw|popcnt|crc32|andn|bextr|bls|bzhi|pdep|pext(?!rw)|mulx|rorx|sarx|shlx|shrx|aes|pclmul)"
)
AVX512_REGISTERS = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]")
# Dot products of AVX-512 VNNI; AVX-VNNI has them in the VEX encoding, which objdump marks with a prefix of its own.
BF16 = "vdpbf16|vcvtne.*ps2bf16|tdp|tile"
# What AArch64 has beyond Armv8.0, and beyond Armv8.2 with the dot product: atomics (LSE), CRC, rounding multiply-adds,
# the dot product; half-precision arithmetic, complex numbers, pointers that are signed (but for hints, which older CPUs
# pass over), ordered loads, bfloat16, products of int8 matrices; and whatever has the registers of SVE.
ARMV82 = r"(ld|st)(add|clr|eor|set|smax|smin|umax|umin)|swp|cas|crc32|sqrdml[as]h|[su]dot"
BEYOND_ARMV82 = (
    r"ldapr|stlur|fc(add|mla)|fjcvt|(br|blr|ret|eret)a[ab]|ldra[ab]|bf(dot|mmla|mlal|cvt)|usdot|sudot|[su]mmla|usmmla|"
    r"rax1|sm[34]|sha512|eor3|bcax|xar|frint(32|64)|cfinv|setf"
)
HALF_ARITHMETIC = re.compile(r"^f(?!cvt|mov)")  # of half-precision registers; conversions are of Armv8.0
SVE_REGISTERS = re.compile(r"\b[zp]\d+\.|\bz\d+\b|\bp\d+/[mz]")


def beyond_armv82(name, operands):
    halves = HALF_ARITHMETIC.match(name) and re.search(r"\bh\d+|\.[48]h", operands)
    return re.match(BEYOND_ARMV82, name) or SVE_REGISTERS.search(operands) or halves


# build: whether an instruction is above it
MUST_NOT = {
    "x86": {
        "baseline": lambda name, operands: name.startswith("v") or name == "{vex}" or BEYOND_SSE2.match(name)
        or (name == "pextrw" and "(" in operands),  # to a register it is SSE2, to memory SSE4.1
        "avx2": lambda name, operands: AVX512_REGISTERS.search(operands) or re.match(r"vpdp|\{vex\}", name),
        "avxvnni": lambda name, operands: AVX512_REGISTERS.search(operands) or name.startswith("vpdp"),
        "avx512": lambda name, operands: re.match(rf"vpdp|\{{vex\}}|{BF16}", name),
        "avx512_vnni": lambda name, operands: re.match(rf"\{{vex\}}|{BF16}", name),
        "avx512_bf16": lambda name, operands: re.match(r"\{vex\}|tdp|tile", name),
    },
    "aarch64": {
        "baseline": lambda name, operands: re.match(ARMV82, name) or beyond_armv82(name, operands),
        "neon": beyond_armv82,
    },
}
# ... and what its kernels must contain
MUST = {
    "x86": {
        "baseline": "mulps", "avx2": "vpmaddwd.*%ymm", "avxvnni": "vpdpbusd.*%ymm", "avx512": "vpmaddwd.*%zmm",
        "avx512_vnni": "vpdpbusd.*%zmm", "avx512_bf16": "vdpbf16ps.*%zmm",
    },
    "aarch64": {"baseline": r"fmul.*\.4s", "neon": r"sdot.*\.4s"},
}

INSTRUCTION = re.compile(r"\s+[0-9a-f]+:\s+(?:(?:lock|repz?|repnz|data16|cs|notrack|bnd)\s+)*(\S+)\s*(.*)")


@functools.cache
def disassembler(machine):
    """The objdump that knows this machine's instructions, "x86" or "aarch64"; None where none is installed."""
    for name in ("objdump", f"{'x86_64' if machine == 'x86' else machine}-linux-gnu-objdump"):
        if path := shutil.which(name):
            known = subprocess.run([path, "--info"], capture_output=True, text=True).stdout
            if re.search("i386:x86-64" if machine == "x86" else machine, known):
                return path
    return None


def instructions(path, machine):
    """(name, operands) of every instruction of a module, each once.

    But those of functions __aarch64_*, which compilers bring along: they ask the CPU before they use its atomics.
    """
    command = [disassembler(machine), "-d", "--no-show-raw-insn", path]
    counts, found = True, set()
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:", line):
            counts = not match[1].startswith("__aarch64_")
        elif counts and (match := INSTRUCTION.match(line)):
            found.add(match.groups())
    return found


def above(listed, build, machine):
    """Those of a module's instructions that its build may not have."""
    return sorted(" ".join(i) for i in listed if MUST_NOT[machine][build](*i))


def has_kernels(listed, build, machine):
    """Whether a module has what the kernels of its build must contain."""
    return any(re.search(MUST[machine][build], " ".join(i)) for i in listed)
