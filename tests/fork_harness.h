/* Regions of OpenMP that are not ours, and the handlers of fork.h in a library that can be unloaded. */
#define _GNU_SOURCE
#include "fork.h"

/* A region of n threads; returns how many there were. */
int region(int n) {
    int count = 0;
#pragma omp parallel num_threads(n) reduction(+ : count)
    count += 1;
    return count;
}

/* A region of n threads, in which thread `who` calls back. */
void call_within(int n, int who, void (*callback)(void)) {
#pragma omp parallel num_threads(n)
    if (omp_get_thread_num() == who) callback();
}

int handlers(void) { return survive_forks(1, 1); }
int can_end_threads(void) { return find_end_threads() != NULL; }
int was_forked(void) { return is_fork(); }
