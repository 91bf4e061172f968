/* Kernels compute in one floating-point environment: rounding to nearest, denormals as they are, no traps.

A caller may have another one, and threads of OpenMP have that of whoever started them: so every task enters ours and
leaves with what was there, flags included. Otherwise bits would depend on who called first. */
#ifndef CYFLASH_ENVIRONMENT_H
#define CYFLASH_ENVIRONMENT_H
#include <stdint.h>

#if defined(__SSE__)
#include <xmmintrin.h>
enum { MXCSR_FLAGS = 0x3f, MXCSR_DEFAULT = 0x1f80 };
static inline uint64_t read_environment(void) { return _mm_getcsr(); }
static inline void set_environment(uint64_t value) { _mm_setcsr((unsigned)value); }
static inline int is_default(uint64_t value) { return (value & ~(uint64_t)MXCSR_FLAGS) == MXCSR_DEFAULT; }
static inline uint64_t default_environment(void) { return MXCSR_DEFAULT; }
#elif defined(__aarch64__)
static inline uint64_t read_environment(void) { /* FPCR << 32 | FPSR */
    uint64_t control, status;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("mrs %0, fpsr" : "=r"(status));
    return control << 32 | (uint32_t)status;
}
static inline void set_environment(uint64_t value) {
    __asm__ volatile("msr fpcr, %0" : : "r"(value >> 32));
    __asm__ volatile("msr fpsr, %0" : : "r"(value & 0xffffffff));
}
static inline int is_default(uint64_t value) { return value >> 32 == 0; }
static inline uint64_t default_environment(void) { return 0; }
#else /* what C knows: the direction of rounding */
#include <fenv.h>
static inline uint64_t read_environment(void) { return (uint64_t)fegetround(); }
static inline void set_environment(uint64_t value) { fesetround((int)value); }
static inline int is_default(uint64_t value) { return value == FE_TONEAREST; }
static inline uint64_t default_environment(void) { return FE_TONEAREST; }
#endif

/* What was there, for leave_environment(). Operands are read from memory after it, and results written before that. */
static inline uint64_t enter_environment(void) {
    uint64_t before = read_environment();
    if (!is_default(before)) set_environment(default_environment());
    __asm__ volatile("" : : : "memory");
    return before;
}

static inline void leave_environment(uint64_t before) {
    __asm__ volatile("" : : : "memory");
    if (read_environment() != before) set_environment(before);
}
#endif
