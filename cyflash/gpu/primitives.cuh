// Everything that the kernels need beyond plain C++, by name. The only file with assembly.
//
// Shared memory is addressed by bytes from its beginning. There is no CUDA header: NVRTC compiles this as it stands.
#pragma once
#include "params.h"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define INFINITY __int_as_float(0x7f800000)
// blocks: how many must fit on a multiprocessor, which limits registers to 65536 / (threads * blocks).
#define KERNEL(name, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)

extern __shared__ __align__(1024) unsigned char shared_memory[];

DEVICE u32 shared_address(u32 at) { return (u32)__cvta_generic_to_shared(shared_memory) + at; }

// ---- threads

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }

// ---- numbers

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The greater one; NaN if either is.
DEVICE float max_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }

// Two floats as two of 16 bits, the first one in the low half.
DEVICE u32 pack_f16(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE float from_f16(u32 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x));
    return y;
}
// Four floats, each rounded half to even into 0..255 (NaN becomes 0), the first one in the low byte.
DEVICE u32 pack_u8(float a, float b, float c, float d) {
    u32 x, y, z, w, low, all;
    asm("cvt.rni.u32.f32 %0, %1;" : "=r"(x) : "f"(a));
    asm("cvt.rni.u32.f32 %0, %1;" : "=r"(y) : "f"(b));
    asm("cvt.rni.u32.f32 %0, %1;" : "=r"(z) : "f"(c));
    asm("cvt.rni.u32.f32 %0, %1;" : "=r"(w) : "f"(d));
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;" : "=r"(low) : "r"(w), "r"(z));
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(y), "r"(x), "r"(low));
    return all;
}
// Four of the eight bytes of low and high, numbered 0 to 7, as the digits of `which` say, the last one first.
DEVICE u32 choose_bytes(u32 low, u32 high, u32 which) { return __byte_perm(low, high, which); }

// ---- global memory

template <int SIZE> DEVICE u32 load_bits(const char* from) {
    return SIZE == 4 ? *(const u32*)from : SIZE == 2 ? *(const u16*)from : *(const u8*)from;
}
DEVICE void store2(void* to, u32 x) { *(u32*)to = x; }
DEVICE void load4(float (&x)[4], const float* from) {
    const float4 y = *(const float4*)from;
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}
DEVICE void store4(float* to, const float (&x)[4]) { *(float4*)to = make_float4(x[0], x[1], x[2], x[3]); }

// ---- shared memory

template <int N> DEVICE void shared_load(float (&x)[N], u32 at) {
    const unsigned char* from = shared_memory + at;
    if constexpr (N == 4) {
        const float4 y = *(const float4*)from;
        x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    } else if constexpr (N == 2) {
        const float2 y = *(const float2*)from;
        x[0] = y.x, x[1] = y.y;
    } else {
        x[0] = *(const float*)from;
    }
}
DEVICE void shared_store(u32 at, float x) { *(float*)(shared_memory + at) = x; }
DEVICE void shared_store4(u32 at, const u32 (&x)[4]) {
    *(uint4*)(shared_memory + at) = make_uint4(x[0], x[1], x[2], x[3]);
}

// Copies 16 bytes, of which n are read and the others become 0, without waiting; `to` and `from` are aligned.
DEVICE void copy16(u32 to, const void* from, int n) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(n) : "memory");
}
DEVICE void copy4(u32 to, const void* from, int n) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(n) : "memory");
}
// Closes a group of this thread's copies; waits until at most N groups are under way.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- tensor cores

// Four matrices of 8 x 8 pairs of bytes. Lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix
// columns 2 (l % 4) and the next one of row l / 4.
DEVICE void load_matrices(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(at)) : "memory");
}
// The same with every matrix transposed.
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(at)) : "memory");
}

// d (16 x 8) += a (16 x K) b (K x 8), K = 32 bytes. With g = lane / 4 and t = lane % 4 a register holds, in words of 4
// bytes of K:
//   a[0], a[1]: rows g, g + 8 of words t;   a[2], a[3]: the same of words t + 4
//   b0: column g of words t;   b1: of words t + 4
//   d[0], d[1]: columns 2 t, 2 t + 1 of row g;   d[2], d[3]: of row g + 8
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// a without signs, b with.
DEVICE void mma_u8_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
