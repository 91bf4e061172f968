// The primitives of hopper.cuh, under the same names, on the machine of machine.h: mbarriers with counts of bytes,
// tensor copies that swizzle and fill with zeros, products of warpgroups. What each does is said in the other
// hopper.cuh.
//
// Each warp makes its 16 rows of a product by itself, when it gets there: nothing but the kernel's barriers keeps the
// warps of a warpgroup together. Registers and shared memory are read when a product is made, not when it is asked for.
#pragma once
#include "hopper_machine.h"
#include "primitives.cuh"

#include <array>

// A 4-dimensional array and a box of it, as the encoded map describes them. Strides in bytes.
struct TensorMap {
    const char* base;
    int size, columns;                    // bytes of an element; of the first axis
    int rows, heads, batches;
    int box_columns, box_rows;
    long long row_stride, head_stride, batch_stride;
};
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

// Rows of 128 or 64 bytes: 16-byte chunks of a line of 128 bytes, numbered in 3 or 2 bits, change places by the line's
// number.
DEVICE u32 swizzled(u32 at, u32 pitch) { return at ^ ((at >> 7 & (pitch == 128 ? 7 : 3)) << 4); }

DEVICE void tensor_copy(u32 at, const TensorMap& map, u32 mbarrier, int column, int row, int head, int batch) {
    const u32 pitch = map.box_columns * map.size;
    if (pitch != 128 && pitch != 64) shim::fail("tensor_copy: rows of %u bytes", pitch);
    if (map.box_rows > 256) shim::fail("tensor_copy: box of %d rows", map.box_rows);
    if ((size_t)map.base % 16 || map.row_stride % 16 || map.head_stride % 16 || map.batch_stride % 16) {
        shim::fail("tensor_copy: array is not aligned to 16 bytes");
    }
    shim::check_shared(at, pitch * map.box_rows, 1024, "tensor_copy");
    shim::by_engine([=] {
        for (int r = 0; r < map.box_rows; r++)
            for (int c = 0; c < map.box_columns; c++) {
                const bool inside = column + c >= 0 && column + c < map.columns && row + r >= 0 && row + r < map.rows &&
                                    head < map.heads && batch < map.batches;
                unsigned char* to = shim::state.shared + swizzled(at + r * pitch + c * map.size, pitch);
                const char* from = map.base + (long long)(column + c) * map.size + (row + r) * map.row_stride +
                                   head * map.head_stride + batch * map.batch_stride;
                if (inside) memcpy(to, from, map.size);
                else memset(to, 0, map.size);
            }
        shim::mbarrier_bytes(mbarrier, pitch * map.box_rows);
    });
    if (shim::state.mixed) shim::yield();
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

// The byte of an operand: row-major rows of K; or, transposed, rows k of columns n.
struct Operand {
    u32 start, panel, eight, pitch;
    Operand(u64 x)
        : start((x & 0x3fff) << 4), panel((x >> 16 & 0x3fff) << 4), eight((x >> 32 & 0x3fff) << 4),
          pitch(x >> 62 == 1 ? 128 : 64) {}
    const unsigned char* at(u32 row, u32 byte) const {
        const u32 to = swizzled(start + row / 8 * eight + row % 8 * pitch + byte, pitch);
        shim::check_shared(to, 1, 1, "wgmma");
        return shim::state.shared + to;
    }
    const unsigned char* transposed(u32 k, u32 byte) const {
        const u32 to = swizzled(start + byte / pitch * panel + k / 8 * eight + k % 8 * pitch + byte % pitch, pitch);
        shim::check_shared(to, 1, 1, "wgmma");
        return shim::state.shared + to;
    }
};

DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {
    shim::collective("wgmma_commit", nullptr, [](void**) { shim::products_commit(); });
}
template <int N, class... Sums> DEVICE void wgmma_wait(Sums&... d) {
    shim::collective("wgmma_wait", nullptr, [](void**) { shim::products_wait(N); });
}

template <class Sum> struct WideSlot {
    Sum* d;
    const u32* a;  // or 0: in shared memory
    u64 a_operand, b;
    bool add, transposed;
};
// The number at `from`, SIZE bytes, as the left or right factor of N.
template <class N> DEVICE typename N::Sum left_of(const unsigned char* from, int e) {
    u32 word = 0;
    memcpy(&word, from, 4 / N::EACH);
    return N::a(word, 0);
}
template <class N> DEVICE typename N::Sum right_of(const unsigned char* from) {
    u32 word = 0;
    memcpy(&word, from, 4 / N::EACH);
    return N::b(word, 0);
}

template <class N, int R> DEVICE void multiply_wide(void** slots) {
    typedef typename N::Sum Sum;
    typedef WideSlot<Sum> Slot;
    std::array<Slot, 32> lanes;
    for (int i = 0; i < 32; i++) {
        lanes[i] = *(const Slot*)slots[i];
        if (lanes[i].b != lanes[0].b || lanes[i].a_operand != lanes[0].a_operand) {
            shim::fail("wgmma: lanes differ in operands");
        }
    }
    const int first_row = shim::state.thread / 32 % 4 * 16;
    shim::add_product([=] {
        const int E = N::EACH, K = 8 * E, COLUMNS = 2 * R, SIZE = 4 / E;
        const Operand a_from(lanes[0].a_operand), b_from(lanes[0].b);
        Sum a[16][K];
        static Sum b[256][K];
        for (int r = 0; r < 16 && !lanes[0].a; r++)
            for (int k = 0; k < K; k++) a[r][k] = left_of<N>(a_from.at(first_row + r, k * SIZE), 0);
        for (int lane = 0; lane < 32 && lanes[0].a; lane++)
            for (int i = 0; i < 4; i++)
                for (int e = 0; e < E; e++) {
                    a[lane / 4 + i % 2 * 8][(lane % 4 + i / 2 * 4) * E + e] = N::a(lanes[lane].a[i], e);
                }
        for (int n = 0; n < COLUMNS; n++)
            for (int k = 0; k < K; k++) {
                b[n][k] = right_of<N>(lanes[0].transposed ? b_from.transposed(k, n * SIZE) : b_from.at(n, k * SIZE));
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < R; i++) {
                const Sum *x = a[lane / 4 + i / 2 % 2 * 8], *y = b[i / 4 * 8 + lane % 4 * 2 + i % 2];
                Sum sum = 0;
                for (int k = 0; k < K; k++) sum += x[k] * y[k];
                Sum& d = lanes[lane].d[i];
                d = lanes[0].add ? d + sum : sum;
            }
        shim::state.products++;
    });
}
template <class N, int R> DEVICE void wide(
    const char* what, typename N::Sum (&d)[R], const u32* a, u64 a_operand, u64 b, bool add, bool transposed
) {
    WideSlot<typename N::Sum> slot = {d, a, a_operand, b, add, transposed};
    shim::collective(what, &slot, multiply_wide<N, R>);
}

#define WIDE_SHARED(NAME, N) \
    template <int R> DEVICE void NAME(N::Sum (&d)[R], u64 a, u64 b, bool add) { \
        wide<N, R>(#NAME, d, nullptr, a, b, add, false); \
    }
#define WIDE_REGISTERS(NAME, N, TRANSPOSED) \
    template <int R> DEVICE void NAME(N::Sum (&d)[R], const u32 (&a)[4], u64 b, bool add) { \
        wide<N, R>(#NAME " of registers", d, a, 0, b, add, TRANSPOSED); \
    }
WIDE_SHARED(wgmma_f16, F16)
WIDE_SHARED(wgmma_bf16, BF16)
WIDE_SHARED(wgmma_s8, S8)
WIDE_REGISTERS(wgmma_f16, F16, true)
WIDE_REGISTERS(wgmma_bf16, BF16, true)
WIDE_REGISTERS(wgmma_u8_s8, U8S8, false)
