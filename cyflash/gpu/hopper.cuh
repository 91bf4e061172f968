// What compute capability 9.0 adds, by name, with its assembly: mbarriers, tiles copied by tensor maps (TMA), products
// of warpgroups (wgmma), registers that move between warpgroups. A warpgroup is four warps, the first one's index a
// multiple of 4.
#pragma once
#include "primitives.cuh"

// How a 4-dimensional array lies in global memory and what one copy takes of it; the driver encodes it.
struct alignas(64) TensorMap {
    u64 opaque[16];
};
struct Maps {
    TensorMap q, k, v;
};

// One block on a multiprocessor: the compiler then lets warpgroups move their registers.
#define HOPPER_KERNEL(name, threads) \
    extern "C" __global__ void __launch_bounds__(threads, 1) \
    name(const __grid_constant__ Params p, const __grid_constant__ Maps maps)

// ---- mbarriers: 8 bytes of shared memory that count arrivals and bytes of a phase; phases have parities 0, 1, 0, ...

DEVICE void mbarrier_init(u32 at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
}
// Makes initialised mbarriers known to tensor copies; a barrier() must follow.
DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void mbarrier_arrive(u32 at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
// Arrives, and makes the phase last until so many bytes have been copied.
DEVICE void mbarrier_arrive_expect(u32 at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(at)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended; the phase before the first one has parity 1 and has ended.
DEVICE void mbarrier_wait(u32 at, u32 parity) {
    u32 ended;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(ended) : "r"(shared_address(at)), "r"(parity) : "memory");
    } while (!ended);
}

// ---- tensor copies

// Starts to copy one box of the map's array, from these coordinates on, to `at`, a multiple of 1024; what lies outside
// the array becomes 0. The box's rows are as long as the map's swizzle, 128 or 64 bytes. The mbarrier gets all its
// bytes.
DEVICE void tensor_copy(u32 at, const TensorMap& map, u32 mbarrier, int column, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(shared_address(at)), "l"(&map), "r"(shared_address(mbarrier)), "r"(column), "r"(row), "r"(head),
                   "r"(batch) : "memory");
}

// ---- warpgroups

template <int N> DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// Barrier `id` (1 to 15) of so many threads, for those who wait and those who only arrive.
DEVICE void named_barrier(int id, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Whether x is true in any of the warpgroup's threads; uses barrier `id`.
DEVICE bool warpgroup_any(bool x, int id) {
    u32 any;
    asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.red.or.pred q, %2, 128, p; selp.u32 %0, 1, 0, q; }"
                 : "=r"(any) : "r"((u32)x), "r"(id) : "memory");
    return any;
}

// ---- products of a warpgroup, which run while its threads go on

// Where an operand lies: rows of PITCH = 128 or 64 bytes, swizzled, eight after eight; `at` is a multiple of 8 PITCH.
// panel: of an operand that is multiplied along its rows' numbers (transposed), the bytes from 64 columns to the next
// 64.
template <int PITCH> DEVICE u64 operand(u32 at, u32 panel = 16) {
    constexpr u64 swizzle = PITCH == 128 ? 1 : 2;
    return (shared_address(at) >> 4 & 0x3fff) | (u64)(panel >> 4) << 16 | (u64)(8 * PITCH >> 4) << 32 | swizzle << 62;
}
// The same, so many bytes further: a multiple of 32 within rows, or of 8 PITCH.
DEVICE u64 onward(u64 operand, u32 bytes) { return operand + (bytes >> 4); }

// Before the first product that follows a change of its registers.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of this warpgroup's products.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int R> DEVICE void pin(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R> DEVICE void pin(int (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+r"(d[i])::"memory");
}
template <int N, int R> DEVICE void pin(int (&d)[N][R]) {
#pragma unroll
    for (int i = 0; i < N; i++) pin(d[i]);
}
// Waits until at most N groups are under way. d: sums that are complete then, which the compiler must not read earlier.
template <int N, class... Sums> DEVICE void wgmma_wait(Sums&... d) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (pin(d), ...);
}

// The compiler works out x, which is never negative, before what follows: softmax before it waits for products, which it
// would else wait for first.
DEVICE void worked_out(float x) {
    if (x < 0.f) shared_store(0, x);
}

// d (64 x N) = a (64 x K) b (K x N) + (add ? d : 0), K = 32 bytes, N = 64, 128 or 256. A warp has 16 rows of d, and of
// them d[4 n + e] of a lane is column 8 n + 2 (lane % 4) + e % 2 of row lane / 4 + e / 2 * 8.
//   a: an operand, row after row; or in registers, of the warp's rows as mma_f16 has them
//   b: an operand, column after column, 32 bytes of K each; with a of 16 bits in registers instead row after row of K
#define WGMMA_TENS(t) \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define WGMMA_LIST_32 WGMMA_TENS() WGMMA_TENS(1) WGMMA_TENS(2) "%30, %31"
#define WGMMA_LIST_64 \
    WGMMA_TENS() WGMMA_TENS(1) WGMMA_TENS(2) WGMMA_TENS(3) WGMMA_TENS(4) WGMMA_TENS(5) "%60, %61, %62, %63"
#define WGMMA_LIST_128 \
    WGMMA_TENS() WGMMA_TENS(1) WGMMA_TENS(2) WGMMA_TENS(3) WGMMA_TENS(4) WGMMA_TENS(5) WGMMA_TENS(6) WGMMA_TENS(7) \
    WGMMA_TENS(8) WGMMA_TENS(9) WGMMA_TENS(10) WGMMA_TENS(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_8(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define WGMMA_32(c, i) WGMMA_8(c, i), WGMMA_8(c, i + 8), WGMMA_8(c, i + 16), WGMMA_8(c, i + 24)
#define WGMMA_SUMS_32(c) WGMMA_32(c, 0)
#define WGMMA_SUMS_64(c) WGMMA_32(c, 0), WGMMA_32(c, 32)
#define WGMMA_SUMS_128(c) WGMMA_SUMS_64(c), WGMMA_32(c, 64), WGMMA_32(c, 96)

// R sums of a lane; r0 .. r5: the numbers of the operands after them; FLAGS: signs, and for 16 bits whether b is
// transposed
#define WGMMA_SHARED(NAME, SUM, C, R, TYPE, FLAGS, r0, r1, r2) \
    DEVICE void NAME(SUM (&d)[R], u64 a, u64 b, bool add) { \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #r2 ", 0; wgmma.mma_async.sync.aligned." TYPE \
                     " {" WGMMA_LIST_##R "}, %" #r0 ", %" #r1 ", p" FLAGS "; }" \
                     : WGMMA_SUMS_##R(C) : "l"(a), "l"(b), "r"((int)add)); \
    }
#define WGMMA_REGISTERS(NAME, SUM, C, R, TYPE, FLAGS, r0, r1, r2, r3, r4, r5) \
    DEVICE void NAME(SUM (&d)[R], const u32 (&a)[4], u64 b, bool add) { \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #r5 ", 0; wgmma.mma_async.sync.aligned." TYPE \
                     " {" WGMMA_LIST_##R "}, {%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #r4 ", p" FLAGS "; }" \
                     : WGMMA_SUMS_##R(C) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add)); \
    }
#define WGMMA_HALVES(NAME, TYPES) \
    WGMMA_SHARED(NAME, float, "+f", 32, "m64n64k16" TYPES, ", 1, 1, 0, 0", 32, 33, 34) \
    WGMMA_SHARED(NAME, float, "+f", 64, "m64n128k16" TYPES, ", 1, 1, 0, 0", 64, 65, 66) \
    WGMMA_REGISTERS(NAME, float, "+f", 32, "m64n64k16" TYPES, ", 1, 1, 1", 32, 33, 34, 35, 36, 37) \
    WGMMA_REGISTERS(NAME, float, "+f", 64, "m64n128k16" TYPES, ", 1, 1, 1", 64, 65, 66, 67, 68, 69) \
    WGMMA_REGISTERS(NAME, float, "+f", 128, "m64n256k16" TYPES, ", 1, 1, 1", 128, 129, 130, 131, 132, 133)
WGMMA_HALVES(wgmma_f16, ".f32.f16.f16")
WGMMA_HALVES(wgmma_bf16, ".f32.bf16.bf16")
WGMMA_SHARED(wgmma_s8, int, "+r", 32, "m64n64k32.s32.s8.s8", "", 32, 33, 34)
WGMMA_SHARED(wgmma_s8, int, "+r", 64, "m64n128k32.s32.s8.s8", "", 64, 65, 66)
WGMMA_REGISTERS(wgmma_u8_s8, int, "+r", 32, "m64n64k32.s32.u8.s8", "", 32, 33, 34, 35, 36, 37)
