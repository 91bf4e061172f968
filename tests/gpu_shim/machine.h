// A machine that runs one CUDA block after another on one CPU thread, each CUDA thread a fiber.
//
// Two legal extremes of what a GPU may do, between which real ones lie:
//   EARLY  copies land when they are issued; one warp runs until it has to wait, warps in a random order of priority
//   LATE   copies land when they are waited for, those by the engine when no thread can go on; warps take turns
// and between them
//   MIXED  as EARLY, but products of warpgroups wait as in LATE, and who arrives at an mbarrier or starts a tensor copy
//          lets others run
// Shared memory begins as bytes 0xff, NaN of any kind. What is wrong ends the run with a message.
//
// Every variant is compiled with this, so here are no headers of the standard library, which take longer than a kernel.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

namespace shim {

struct State {
    unsigned char* shared;  // memory of the block
    u32 shared_bytes;
    int thread, block;      // those that run now
    bool early, mixed;
    long matrix_reads;      // eight rows by load_matrices
    long conflicts;         // of which rows fell into the same banks
    long products;          // of tensor cores
};
extern State state;

[[noreturn]] void fail(const char* format, ...);

// Waits for all threads of the block that have not ended. line: where.
void barrier(int line);

// All lanes of the warp call it with the same `what`; the last one does the work for all: work(slots of 32 lanes).
void collective(const char* what, void* slot, void (*work)(void**));

// Asynchronous copies of this thread: n of `bytes` bytes are read, the others become 0.
void copy(u32 to, const void* from, int n, int bytes);
void commit();
void wait(int groups);

// Raises unless these bytes are shared memory, aligned; or global memory that the kernel may read.
void check_shared(u32 at, u32 bytes, u32 alignment, const char* what);
void check_global(const void* from, int bytes, const char* what);

}  // namespace shim
