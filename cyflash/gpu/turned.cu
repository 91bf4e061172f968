// V of codes, transposed for hopper.cu: out (B, Hk, D, keys) from v (B, Hk, Lk, D), keys rounded up to 16, 0 beyond the
// last. Strides as in Params, those of out for its row, a channel; v's rows and out's begin anywhere and at multiples
// of 16.
//
// Of each 16 keys byte 4 t + e is key 8 (e / 2) + 2 t + e % 2: those whose weights lane t of four has in registers, in
// order. A thread makes 16 bytes: one channel of 16 keys. Neighbours read neighbouring channels.
#include "types.cuh"

constexpr int THREADS = 128;

KERNEL(cyflash_turn, THREADS, 8) {
    const int groups = (p.Lk + 15) / 16;
    const long long index = (long long)block_index() * THREADS + thread_index();
    const int channel = (int)(index % p.D);
    const long long rest = index / p.D;
    const int group = (int)(rest % groups), head = (int)(rest / groups);
    if (head >= p.B * p.Hk) return;
    const int b = head / p.Hk, h = head % p.Hk;
    const char* from = (const char*)p.v + (b * p.v_stride[0] + h * p.v_stride[1] + channel);
    char* to = (char*)p.out + (b * p.out_stride[0] + h * p.out_stride[1] + channel * p.out_stride[2] + group * 16);
    u32 word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int key = group * 16 + i / 4 * 2 + i % 4 / 2 * 8 + i % 2;
        if (key < p.Lk) word[i / 4] |= load_bits<1>(from + key * p.v_stride[2]) << i % 4 * 8;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) store2(to + i * 4, word[i]);
}
