/* Calls that run at the same time share the threads of the process.

A call takes its threads when it begins to compute and gives them back at its end. Its own thread computes as well, so
what is shared are the others: of a budget of n threads at most n - 1 are at work beside those that make the calls,
however many do. A call gets an equal part of the budget, but only what is free; the parts even out as calls follow each
other. Without a lock, which a fork could leave locked in the child. */
#ifndef CYFLASH_SHARE_H
#define CYFLASH_SHARE_H
#include <stdint.h>

static uint64_t running;        /* calls << 32 | their threads */
static __thread uint64_t mine;  /* the same, of this thread's calls: what a forked child goes on with */

/* The threads of a call that keeps `most` of them busy. budget: of the process; 0 if the caller said how many. */
static int take(int most, int budget) {
    uint64_t before = __atomic_load_n(&running, __ATOMIC_RELAXED), more;
    int n;
    do {
        int calls = (int)(before >> 32) + 1, unused = budget - (int)(uint32_t)before;
        n = most;
        if (budget) {
            n = n < budget / calls ? n : budget / calls;
            n = n < unused ? n : unused;
            n = n > 1 ? n : 1;
        }
        more = (uint64_t)1 << 32 | (uint32_t)n;
    } while (!__atomic_compare_exchange_n(&running, &before, before + more, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    mine += more;
    return n;
}

static void give(int n) {
    uint64_t less = (uint64_t)1 << 32 | (uint32_t)n;
    __atomic_fetch_sub(&running, less, __ATOMIC_RELAXED);
    mine -= less;
}

/* In a forked child: calls of other threads have ended with these. */
static void forget_others(void) { __atomic_store_n(&running, mine, __ATOMIC_RELAXED); }
#endif
