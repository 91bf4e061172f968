// load_matrices and the products of tensor cores: 32 lanes' registers <-> matrices.
#pragma once

struct MatrixSlot {
    u32 at;
    u32* r;
};

template <bool TRANSPOSED> DEVICE void load_four(void** slots) {
    shim::State& state = shim::state;
    for (int i = 0; i < 4; i++) {
        u16 rows[8][8];
        u32 groups = 0;
        for (int r = 0; r < 8; r++) {
            const u32 at = ((MatrixSlot*)slots[i * 8 + r])->at;
            memcpy(rows[r], state.shared + at, 16);
            groups |= 1u << at / 16 % 8;
        }
        state.matrix_reads++;
        state.conflicts += groups != 255;
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, c = lane % 4 * 2;
            const u32 low = TRANSPOSED ? rows[c][g] : rows[g][c], high = TRANSPOSED ? rows[c + 1][g] : rows[g][c + 1];
            ((MatrixSlot*)slots[lane])->r[i] = low | high << 16;
        }
    }
}
DEVICE void load_matrices(u32 (&r)[4], u32 at) {
    shim::check_shared(at, 16, 16, "load_matrices");
    MatrixSlot slot = {at, r};
    shim::collective("load_matrices", &slot, load_four<false>);
}
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 at) {
    shim::check_shared(at, 16, 16, "load_matrices_transposed");
    MatrixSlot slot = {at, r};
    shim::collective("load_matrices_transposed", &slot, load_four<true>);
}

template <class Sum> struct ProductSlot {
    const u32* a;
    u32 b[2];
    Sum* d;
};

// The numbers in a word: EACH of them.
struct F16 {
    typedef float Sum;
    static const int EACH = 2;
    static float a(u32 word, int e) { return shim::from_half(word >> 16 * e & 0xffff); }
    static float b(u32 word, int e) { return a(word, e); }
};
struct BF16 : F16 {
    static float a(u32 word, int e) { return shim::from_bfloat(word >> 16 * e & 0xffff); }
    static float b(u32 word, int e) { return a(word, e); }
};
struct S8 {
    typedef int Sum;
    static const int EACH = 4;
    static int a(u32 word, int e) { return (signed char)(word >> 8 * e); }
    static int b(u32 word, int e) { return a(word, e); }
};
struct U8S8 : S8 {
    static int a(u32 word, int e) { return (u8)(word >> 8 * e); }
};

template <class N> DEVICE void multiply_all(void** slots) {
    typedef typename N::Sum Sum;
    typedef ProductSlot<Sum> Slot;
    const int E = N::EACH, K = 8 * E;
    Sum a[16][K], b[8][K];
    for (int lane = 0; lane < 32; lane++) {
        const Slot* slot = (const Slot*)slots[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < E; e++) a[g + i % 2 * 8][(t + i / 2 * 4) * E + e] = N::a(slot->a[i], e);
        for (int i = 0; i < 2; i++)
            for (int e = 0; e < E; e++) b[g][(t + i * 4) * E + e] = N::b(slot->b[i], e);
    }
    for (int lane = 0; lane < 32; lane++) {
        const Slot* slot = (const Slot*)slots[lane];
        for (int i = 0; i < 4; i++) {
            const Sum *x = a[lane / 4 + i / 2 * 8], *y = b[lane % 4 * 2 + i % 2];
            Sum sum = 0;
            for (int k = 0; k < K; k++) sum += x[k] * y[k];
            slot->d[i] += sum;
        }
    }
    shim::state.products++;
}
template <class N> DEVICE void multiply(const char* what, typename N::Sum (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    ProductSlot<typename N::Sum> slot = {a, {b0, b1}, d};
    shim::collective(what, &slot, multiply_all<N>);
}
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<F16>("mma_f16", d, a, b0, b1); }
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<BF16>("mma_bf16", d, a, b0, b1); }
DEVICE void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<S8>("mma_s8", d, a, b0, b1); }
DEVICE void mma_u8_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<U8S8>("mma_u8_s8", d, a, b0, b1); }
