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
    #if defined(__aarch64__) && defined(__linux__)
    #include <sys/auxv.h>
    static uint64_t hwcap(void) { return getauxval(AT_HWCAP); }
    #else
    static uint64_t hwcap(void) { return 0; }
    #endif
    #if defined(__aarch64__) && defined(__APPLE__)
    #include <sys/sysctl.h>
    static int sysctl_flag(const char *name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value;
    }
    static int sysctl_text(const char *name, char *to, size_t size) {
        return sysctlbyname(name, to, &size, NULL, 0) == 0;
    }
    #else
    static int sysctl_flag(const char *name) { (void)name; return 0; }
    static int sysctl_text(const char *name, char *to, size_t size) { (void)name; (void)to; (void)size; return 0; }
    #endif
    """
    void cpuid(unsigned int leaf, unsigned int subleaf, unsigned int* registers) noexcept
    unsigned long long xcr0() noexcept
    unsigned long long hwcap() noexcept
    bint sysctl_flag(const char* name) noexcept
    bint sysctl_text(const char* name, char* to, size_t size) noexcept

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

# feature of AArch64, by its name in /proc/cpuinfo: (bit of Linux's AT_HWCAP, what macOS calls it)
ARM_FEATURES = {
    "crc32": (7, b"hw.optional.armv8_crc32"),
    "atomics": (8, b"hw.optional.arm.FEAT_LSE"),
    "asimdrdm": (12, b"hw.optional.arm.FEAT_RDM"),
    "asimddp": (20, b"hw.optional.arm.FEAT_DotProd"),
}


def read_cpuid(unsigned int leaf, unsigned int subleaf):
    """The four registers (EAX, EBX, ECX, EDX) of a CPUID leaf; zeros where there is none."""
    cdef unsigned int registers[4]
    cpuid(leaf, subleaf, registers)
    return tuple(registers[i] for i in range(4))


def read_hwcap():
    """What Linux says of an AArch64 CPU, a bit for each feature; 0 elsewhere."""
    return hwcap()


cdef frozenset _find_features():
    osxsave = read_cpuid(1, 0)[ECX] >> 27 & 1
    enabled = xcr0() if osxsave else 0
    x86 = {
        name for name, (leaf, subleaf, register, bit, saved) in FEATURES.items()
        if read_cpuid(leaf, subleaf)[register] >> bit & 1 and enabled & saved == saved
    }
    return frozenset(
        x86 | {name for name, (bit, flag) in ARM_FEATURES.items() if read_hwcap() >> bit & 1 or sysctl_flag(flag)}
    )


cdef frozenset _features = _find_features()  # once: a virtual machine answers each CPUID in 10 us or more


def features():
    """Names of the features of FEATURES and ARM_FEATURES that this CPU has and this operating system has enabled."""
    return _features


def model():
    """The CPU's own name, or an empty string: on Linux those of AArch64 have none."""
    cdef char name[64]
    if sysctl_text(b"machdep.cpu.brand_string", name, sizeof(name)):
        return name.decode("ascii", "replace")
    if read_cpuid(0x80000000, 0)[EAX] < 0x80000004:
        return ""
    words = [word for leaf in (0x80000002, 0x80000003, 0x80000004) for word in read_cpuid(leaf, 0)]
    return b"".join(word.to_bytes(4, "little") for word in words).split(b"\0")[0].decode("ascii", "replace").strip()


def openmp():
    """(whether this build has OpenMP, its version date, the OpenMP runtime's own thread limit now)"""
    return bool(HAS_OPENMP), OPENMP_VERSION, omp_get_max_threads()
