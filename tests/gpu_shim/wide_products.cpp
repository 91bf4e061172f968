// multiply_wide of tensor_cores.h.
#include "hopper_machine.h"
#include "numbers_in_words.h"
#include "tensor_cores.h"

namespace shim {

// The byte of an operand: row-major rows of K; or, transposed, rows k of columns n.
struct Operand {
    u32 start, panel, eight, pitch;
    Operand(u64 x)
        : start((x & 0x3fff) << 4), panel((x >> 16 & 0x3fff) << 4), eight((x >> 32 & 0x3fff) << 4),
          pitch(x >> 62 == 1 ? 128 : 64) {}
    const unsigned char* at(u32 row, u32 byte) const {
        return check(start + row / 8 * eight + row % 8 * pitch + byte);
    }
    const unsigned char* transposed(u32 k, u32 byte) const {
        return check(start + byte / pitch * panel + k / 8 * eight + k % 8 * pitch + byte % pitch);
    }
    const unsigned char* check(u32 at) const {
        const u32 to = swizzled(at, pitch);
        check_shared(to, 1, 1, "wgmma");
        return state.shared + to;
    }
};

struct WideSlot {
    void* d;
    const u32* a;  // or 0: in shared memory
    u64 left, b;
    bool add, by_rows;
    int columns;
};

// The number at `from` as a word.
template <class N> static u32 word_at(const unsigned char* from) {
    u32 word = 0;
    memcpy(&word, from, 4 / N::EACH);
    return word;
}

template <class N> struct WideProduct : Product {
    typedef typename N::Sum Sum;
    WideSlot lanes[32];
    int first_row;

    void make() override {
        const int E = N::EACH, K = 8 * E, SIZE = 4 / E;
        const WideSlot& all = lanes[0];
        const Operand left(all.left), right(all.b);
        Sum a[16][K];
        static Sum b[256][K];
        for (int r = 0; r < 16 && !all.a; r++)
            for (int k = 0; k < K; k++) a[r][k] = N::a(word_at<N>(left.at(first_row + r, k * SIZE)), 0);
        for (int lane = 0; lane < 32 && all.a; lane++)
            for (int i = 0; i < 4; i++)
                for (int e = 0; e < E; e++) {
                    a[lane / 4 + i % 2 * 8][(lane % 4 + i / 2 * 4) * E + e] = N::a(lanes[lane].a[i], e);
                }
        for (int n = 0; n < all.columns; n++)
            for (int k = 0; k < K; k++) {
                b[n][k] = N::b(word_at<N>(all.by_rows ? right.transposed(k, n * SIZE) : right.at(n, k * SIZE)), 0);
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < all.columns / 2; i++) {
                const Sum *x = a[lane / 4 + i / 2 % 2 * 8], *y = b[i / 4 * 8 + lane % 4 * 2 + i % 2];
                Sum sum = 0;
                for (int k = 0; k < K; k++) sum += x[k] * y[k];
                Sum& d = ((Sum*)lanes[lane].d)[i];
                d = all.add ? d + sum : sum;
            }
        state.products++;
    }
};

template <class N> static void ask(void** slots) {
    auto* product = new WideProduct<N>;
    for (int i = 0; i < 32; i++) {
        const WideSlot& lane = product->lanes[i] = *(const WideSlot*)slots[i];
        if (lane.b != product->lanes[0].b || lane.left != product->lanes[0].left) {
            fail("wgmma: lanes differ in operands");
        }
    }
    product->first_row = state.thread / 32 % 4 * 16;
    add_product(product);
}

void multiply_wide(Numbers numbers, int columns, void* d, const u32* a, u64 left, u64 b, bool add, bool by_rows) {
    WideSlot slot = {d, a, left, b, add, by_rows, columns};
    switch (numbers) {
        case Numbers::F16: return collective(a ? "wgmma_f16 of registers" : "wgmma_f16", &slot, ask<F16>);
        case Numbers::BF16: return collective(a ? "wgmma_bf16 of registers" : "wgmma_bf16", &slot, ask<BF16>);
        case Numbers::S8: return collective("wgmma_s8", &slot, ask<S8>);
        case Numbers::U8S8: return collective("wgmma_u8_s8", &slot, ask<U8S8>);
    }
}

}  // namespace shim
