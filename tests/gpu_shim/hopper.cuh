// The primitives of hopper.cuh, under the same names, on the machine of machine.h: mbarriers with counts of bytes,
// tensor copies that swizzle and fill with zeros, products of warpgroups. What each does is said in the other
// hopper.cuh.
#pragma once
#include "hopper_machine.h"
#include "primitives.cuh"

using shim::TensorMap;
struct Maps {
    TensorMap q, k, v;
};

#undef CALL_KERNEL
#define CALL_KERNEL(p, maps) kernel_entry(p, *(const Maps*)maps)
#define HOPPER_KERNEL(name, threads) static void kernel_entry(const Params p, const Maps& maps)

DEVICE void mbarrier_init(u32 at, int arrivals) { shim::mbarrier_init(at, arrivals); }
DEVICE void mbarrier_init_fence() {}
DEVICE void mbarrier_arrive(u32 at) { shim::mbarrier_arrive(at, 0); }
DEVICE void mbarrier_arrive_expect(u32 at, int bytes) { shim::mbarrier_arrive(at, bytes); }
DEVICE void mbarrier_wait(u32 at, u32 parity) { shim::mbarrier_wait(at, parity); }

DEVICE void tensor_copy(u32 at, const TensorMap& map, u32 mbarrier, int column, int row, int head, int batch) {
    shim::copy_box(at, map, mbarrier, column, row, head, batch);
}

template <int N> DEVICE void registers_up() {}
template <int N> DEVICE void registers_down() {}
DEVICE void named_barrier(int id, int threads) { shim::named_barrier(id, threads, true); }
DEVICE void named_barrier_arrive(int id, int threads) { shim::named_barrier(id, threads, false); }
DEVICE bool warpgroup_any(bool x, int id) { return shim::named_any(id, 128, x); }

template <int PITCH> DEVICE u64 operand(u32 at, u32 panel = 16) {
    if (at % (8 * PITCH)) shim::fail("operand: %u is not a multiple of %d", at, 8 * PITCH);
    return at >> 4 | (u64)(panel >> 4) << 16 | (u64)(8 * PITCH >> 4) << 32 | (u64)(PITCH == 128 ? 1 : 2) << 62;
}
DEVICE u64 onward(u64 operand, u32 bytes) { return operand + (bytes >> 4); }

DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {
    shim::collective("wgmma_commit", nullptr, [](void**) { shim::products_commit(); });
}
template <int N, class... Sums> DEVICE void wgmma_wait(Sums&... d) {
    shim::collective("wgmma_wait", nullptr, [](void**) { shim::products_wait(N); });
}

DEVICE void worked_out(float) {}

#define WIDE_SHARED(NAME, NUMBERS, SUM) \
    template <int R> DEVICE void NAME(SUM (&d)[R], u64 a, u64 b, bool add) { \
        shim::multiply_wide(shim::Numbers::NUMBERS, 2 * R, d, 0, a, b, add, false); \
    }
#define WIDE_REGISTERS(NAME, NUMBERS, SUM, BY_ROWS) \
    template <int R> DEVICE void NAME(SUM (&d)[R], const u32 (&a)[4], u64 b, bool add) { \
        shim::multiply_wide(shim::Numbers::NUMBERS, 2 * R, d, a, 0, b, add, BY_ROWS); \
    }
WIDE_SHARED(wgmma_f16, F16, float)
WIDE_SHARED(wgmma_bf16, BF16, float)
WIDE_SHARED(wgmma_s8, S8, int)
WIDE_REGISTERS(wgmma_f16, F16, float, true)
WIDE_REGISTERS(wgmma_bf16, BF16, float, true)
WIDE_REGISTERS(wgmma_u8_s8, U8S8, int, false)
