// load_four and multiply of tensor_cores.h.
#include "tensor_cores.h"
#include "numbers_in_words.h"

namespace shim {

struct MatrixSlot {
    u32 at;
    u32* r;
};

template <bool TRANSPOSED> static void load(void** slots) {
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

void load_four(u32* r, u32 at, bool transposed) {
    check_shared(at, 16, 16, "load_matrices");
    MatrixSlot slot = {at, r};
    if (transposed) collective("load_matrices_transposed", &slot, load<true>);
    else collective("load_matrices", &slot, load<false>);
}

struct ProductSlot {
    const u32* a;
    u32 b[2];
    void* d;
};

template <class N> static void product(void** slots) {
    typedef typename N::Sum Sum;
    const int E = N::EACH, K = 8 * E;
    Sum a[16][K], b[8][K];
    for (int lane = 0; lane < 32; lane++) {
        const ProductSlot* slot = (const ProductSlot*)slots[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < E; e++) a[g + i % 2 * 8][(t + i / 2 * 4) * E + e] = N::a(slot->a[i], e);
        for (int i = 0; i < 2; i++)
            for (int e = 0; e < E; e++) b[g][(t + i * 4) * E + e] = N::b(slot->b[i], e);
    }
    for (int lane = 0; lane < 32; lane++) {
        Sum* d = (Sum*)((const ProductSlot*)slots[lane])->d;
        for (int i = 0; i < 4; i++) {
            const Sum *x = a[lane / 4 + i / 2 * 8], *y = b[lane % 4 * 2 + i % 2];
            Sum sum = 0;
            for (int k = 0; k < K; k++) sum += x[k] * y[k];
            d[i] += sum;
        }
    }
    state.products++;
}

void multiply(Numbers numbers, void* d, const u32* a, u32 b0, u32 b1) {
    ProductSlot slot = {a, {b0, b1}, d};
    switch (numbers) {
        case Numbers::F16: return collective("mma_f16", &slot, product<F16>);
        case Numbers::BF16: return collective("mma_bf16", &slot, product<BF16>);
        case Numbers::S8: return collective("mma_s8", &slot, product<S8>);
        case Numbers::U8S8: return collective("mma_u8_s8", &slot, product<U8S8>);
    }
}

}  // namespace shim
