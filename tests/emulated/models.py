"""CPUs that qemu emulates, and the SIMD build that each has to choose. AVX-512 and AVX-VNNI qemu does not know."""
from typing import NamedTuple


class Model(NamedTuple):
    machine: str  # as platform.machine() says it
    build: str
    options: str = ""  # of qemu's -cpu, after the name


QUIET = ",check=off"  # qemu warns of every feature that it lacks, on the standard error of each process
MODELS = {
    "SandyBridge": Model("x86_64", "baseline", QUIET),  # AVX; no FMA, no AVX2
    "IvyBridge": Model("x86_64", "baseline", QUIET),  # the same and F16C
    "Haswell": Model("x86_64", "avx2", QUIET),
    "EPYC-Rome": Model("x86_64", "avx2", QUIET),
    "cortex-a53": Model("aarch64", "baseline"),  # Armv8.0
    "cortex-a72": Model("aarch64", "baseline"),
    "a64fx": Model("aarch64", "baseline"),  # Armv8.2 and SVE; no dot product
    "cortex-a76": Model("aarch64", "neon"),
    "neoverse-n1": Model("aarch64", "neon"),
    "max": Model("aarch64", "neon"),  # all that qemu has for it
}
