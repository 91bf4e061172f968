# What this CPU and its operating system can run, read without executing anything beyond the baseline.

cdef extern from *:
    """
    #include <stdint.h>
    #if defined(__x86_64__) || defined(__i386__)
    #include <cpuid.h>
    static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t *r) {
        if (!__get_cpuid_count(leaf, subleaf, r, r + 1, r + 2, r + 3)) r[0] = r[1] = r[2] = r[3] = 0;
    }
    static uint64_t xcr0(void) {
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return ((uint64_t)high << 32) | low;
    }
    #else
    static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t *r) { r[0] = r[1] = r[2] = r[3] = 0; }
    static uint64_t xcr0(void) { return 0; }
    #endif
    """
    void cpuid(unsigned int leaf, unsigned int subleaf, unsigned int* registers) noexcept
    unsigned long long xcr0() noexcept

cdef extern from "openmp.h":
    enum:
        HAS_OPENMP
        OPENMP_VERSION
    int omp_get_max_threads()

EAX, EBX, ECX, EDX = range(4)

# Registers that the operating system must save (bits of XCR0) before a feature may be used.
cdef int YMM = 0x06, ZMM = 0xe6

# feature: (CPUID leaf, subleaf, register, bit, XCR0 bits). Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.
FEATURES = {
    "sse2": (1, 0, EDX, 26, 0),
    "avx": (1, 0, ECX, 28, YMM),
    "fma": (1, 0, ECX, 12, YMM),
    "f16c": (1, 0, ECX, 29, YMM),
    "avx2": (7, 0, EBX, 5, YMM),
    "avxvnni": (7, 1, EAX, 4, YMM),
    "avx512f": (7, 0, EBX, 16, ZMM),
    "avx512dq": (7, 0, EBX, 17, ZMM),
    "avx512bw": (7, 0, EBX, 30, ZMM),
    "avx512vl": (7, 0, EBX, 31, ZMM),
    "avx512_vnni": (7, 0, ECX, 11, ZMM),
    "avx512_bf16": (7, 1, EAX, 5, ZMM),
}


def read_cpuid(unsigned int leaf, unsigned int subleaf):
    """The four registers (EAX, EBX, ECX, EDX) of a CPUID leaf; zeros where there is none."""
    cdef unsigned int registers[4]
    cpuid(leaf, subleaf, registers)
    return tuple(registers[i] for i in range(4))


cdef object _features = None  # once found: a virtual machine answers each CPUID in 10 us or more: dozens of them


def features():
    """Names of the features of FEATURES that this CPU has and this operating system has enabled."""
    global _features
    if _features is None:
        _features = _find_features()
    return _features


cdef object _find_features():
    osxsave = read_cpuid(1, 0)[ECX] >> 27 & 1
    enabled = xcr0() if osxsave else 0
    return frozenset(
        name for name, (leaf, subleaf, register, bit, saved) in FEATURES.items()
        if read_cpuid(leaf, subleaf)[register] >> bit & 1 and enabled & saved == saved
    )


def model():
    """The CPU's own name, or an empty string."""
    if read_cpuid(0x80000000, 0)[EAX] < 0x80000004:
        return ""
    words = [word for leaf in (0x80000002, 0x80000003, 0x80000004) for word in read_cpuid(leaf, 0)]
    return b"".join(word.to_bytes(4, "little") for word in words).split(b"\0")[0].decode("ascii", "replace").strip()


def openmp():
    """(whether this build has OpenMP, its version date, the OpenMP runtime's own thread limit now)"""
    return bool(HAS_OPENMP), OPENMP_VERSION, omp_get_max_threads()
