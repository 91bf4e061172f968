/* Calls on several threads survive a fork.

GNU's OpenMP keeps the threads of a region for the thread that began it. A forked child has that record without the
threads, and would wait for them for ever in its next region. So before a fork the forking thread's are ended by
omp_pause_resource_all, and parent and child start new ones when they need them. GNU's ends those of the calling thread
only, and refuses within a region; LLVM's aborts in the child, so it is called of GNU's only. Where threads could not
be ended, the child is marked, and its calls have one thread.

The handlers stand from the import on, for another library may begin regions of the same runtime before we do. A process
that was forked before the import may have such a record itself, if the runtime was there before us, and ending its
threads would wait as well: its first thread, which is that of the fork, is left alone there, and what it forks is
marked. */
#ifndef CYFLASH_FORK_H
#define CYFLASH_FORK_H
#include <stdio.h>
#include <string.h>
#include "openmp.h"
#include "share.h"

static int lost;               /* this process is a child without the threads of its record */
static __thread int started;   /* this thread has made a call on several threads */

static void starts_threads(void) { started = 1; }
static int threads_lost(void) { return lost; }

#if defined(_OPENMP) && !defined(_WIN32)
#include <pthread.h>

static int (*end_threads)(int); /* omp_pause_resource_all of GNU's OpenMP, or NULL */
static int clean;               /* no record can be older than this process, as far as the system says */
static __thread int left;       /* of the fork under way: threads that could not be ended */

#ifdef __linux__
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Asked of the very library that runs our regions: a process may have several. */
static int (*find_end_threads(void))(int) {
    Dl_info place;
    const char *name;
    void *library, *found;
    if (!dladdr((void *)omp_get_max_threads, &place) || place.dli_fname == NULL) return NULL;
    name = strrchr(place.dli_fname, '/');
    if (strncmp(name ? name + 1 : place.dli_fname, "libgomp", 7)) return NULL;
    library = dlopen(place.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL) return NULL;
    /* LLVM's may be installed under GNU's name, but has entries of its own; GNU's before GCC 9 cannot end threads. */
    found = dlsym(library, "__kmpc_fork_call") ? NULL : dlsym(library, "omp_pause_resource_all");
    dlclose(library); /* our own link still holds it */
    return (int (*)(int))found;
}

/* Whether this process was forked and has executed no program since: PF_FORKNOEXEC of its flags, field 9 of stat. */
static int is_fork(void) {
    char text[1024], *rest;
    size_t n;
    unsigned flags;
    FILE *file = fopen("/proc/self/stat", "re");
    if (file == NULL) return 1;
    n = fread(text, 1, sizeof(text) - 1, file);
    fclose(file);
    text[n] = 0;
    rest = strrchr(text, ')');
    if (rest == NULL || sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return 1;
    return (flags & 0x40) != 0;
}

static int is_first_thread(void) { return syscall(SYS_gettid) == getpid(); }
#else
static int (*find_end_threads(void))(int) { return NULL; }
static int is_fork(void) { return 1; }
static int is_first_thread(void) { return 1; }
#endif

static void before_fork(void) {
    if (end_threads == NULL || lost)
        left = started || omp_in_parallel();
    else if (omp_in_parallel() || (!clean && is_first_thread()))
        left = 1;
    else
        left = end_threads(2 /* omp_pause_hard */);
}

static void in_child(void) {
    lost = lost || left;
    forget_others();
}

/* Register the handlers, once. ending: whether threads may be ended. loaded: whether there was a runtime before us.
Returns an error number, or 0. glibc takes the handlers back when the module that holds them is unloaded. */
static int survive_forks(int ending, int loaded) {
    static int registered;
    if (__atomic_exchange_n(&registered, 1, __ATOMIC_RELAXED)) return 0;
    clean = !loaded || !is_fork();
    end_threads = ending ? find_end_threads() : NULL;
    return pthread_atfork(before_fork, NULL, in_child);
}
#else
static int survive_forks(int ending, int loaded) {
    (void)ending, (void)loaded;
    return 0;
}
#endif
#endif
