/* OpenMP where the compiler has it, one thread where it has not. */
#ifndef CYFLASH_OPENMP_H
#define CYFLASH_OPENMP_H
#ifdef _OPENMP
#include <omp.h>
enum { HAS_OPENMP = 1, OPENMP_VERSION = _OPENMP };
#else
enum { HAS_OPENMP = 0, OPENMP_VERSION = 0 };
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
#endif
#endif
