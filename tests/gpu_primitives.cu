// Each primitive of primitives.cuh and hopper.cuh by itself, on what the tests give it: one macro chooses which. The same
// source runs on the machine of gpu_shim/ and on a GPU; gpu_primitives.py has the inputs and what must come out.
//
// p.q, p.k: inputs; p.out: results. One block.
#if defined(WARPGROUPS)
#include "hopper.cuh"
#define TEST(threads) HOPPER_KERNEL(cyflash_primitive, threads)
#else
#include "primitives.cuh"
#define TEST(threads) KERNEL(cyflash_primitive, threads, 1)
#endif

DEVICE const u32* words(const void* x) { return (const u32*)x; }

// Shared memory from `at` on as `bytes` bytes of an input; all of the block's threads.
DEVICE void fill(u32 at, const void* from, int bytes, int threads) {
    for (int i = thread_index() * 16; i < bytes; i += threads * 16) {
        u32 x[4];
        for (int e = 0; e < 4; e++) x[e] = words(from)[i / 4 + e];
        shared_store4(at + i, x);
    }
}
DEVICE void empty_out(void* to, u32 at, int bytes, int threads) {
    for (int i = thread_index() * 4; i < bytes; i += threads * 4) {
        float x[1];
        shared_load(x, at + i);
        ((u32*)to)[i / 4] = bits_of(x[0]);
    }
}

#if defined(TEST_EXCHANGE)

// Two warps: a shuffle for each distance, then whether any lane's number is above one half.
TEST(64) {
    const int i = thread_index();
    const float* x = (const float*)p.q;
    float* out = (float*)p.out;
    for (int n = 0; n < 5; n++) out[n * 64 + i] = shuffle_xor(x[n * 64 + i], 1 << n);
    for (int n = 0; n < 5; n++) out[(5 + n) * 64 + i] = warp_any(x[n * 64 + i] > 0.5f) ? 1.f : 0.f;
}

#elif defined(TEST_NUMBERS)

// p.Lk quadruples of numbers, eight results of each.
TEST(128) {
    const float* x = (const float*)p.q;
    u32* out = (u32*)p.out;
    for (int i = thread_index(); i < p.Lk; i += 128) {
        const float a = x[4 * i], b = x[4 * i + 1], c = x[4 * i + 2], d = x[4 * i + 3];
        const u32 results[8] = {
            bits_of(exp2_fast(a)), bits_of(reciprocal(a)), bits_of(max_nan(a, b)), pack_f16(a, b), pack_bf16(a, b),
            bits_of(from_f16(bits_of(a) & 0xffff)), pack_u8(a, b, c, d),
            choose_bytes(bits_of(a), bits_of(b), 0x6420) ^ choose_bytes(bits_of(c), bits_of(d), 0x7531)
        };
        for (int e = 0; e < 8; e++) out[8 * i + e] = results[e];
    }
}

#elif defined(TEST_MATRICES)

// 4 KB of shared memory; p.k: where each lane's row begins.
TEST(32) {
    fill(0, p.q, 4096, 32);
    barrier();
    const u32 at = words(p.k)[thread_index()];
    u32 plain[4], transposed[4];
    load_matrices(plain, at);
    load_matrices_transposed(transposed, at);
    for (int e = 0; e < 4; e++) {
        ((u32*)p.out)[thread_index() * 8 + e] = plain[e];
        ((u32*)p.out)[thread_index() * 8 + 4 + e] = transposed[e];
    }
}

#elif defined(TEST_PRODUCT)

// p.Lk products: of each lane four words of a, two of b, four sums.
TEST(32) {
    for (int n = 0; n < p.Lk; n++) {
        const u32* x = words(p.q) + (n * 32 + thread_index()) * 10;
        const u32 a[4] = {x[0], x[1], x[2], x[3]};
        SUM_TYPE d[4];
        for (int e = 0; e < 4; e++) d[e] = ((const SUM_TYPE*)x)[6 + e];
        OF_WARPS(d, a, x[4], x[5]);
        for (int e = 0; e < 4; e++) ((SUM_TYPE*)p.out)[(n * 32 + thread_index()) * 4 + e] = d[e];
    }
}

#elif defined(TEST_COPIES)

// Lane l copies p.k[l] of 16 bytes, then of a second group p.k[32 + l] of 4; the first one is read while the second one
// may be under way.
TEST(32) {
    const int lane = thread_index();
    const u32 ones[4] = {~0u, ~0u, ~0u, ~0u};
    for (int i = 0; i < 2; i++) shared_store4((lane + 32 * i) * 16, ones);
    barrier();
    copy16(lane * 16, (const char*)p.q + lane * 16, words(p.k)[lane]);
    copy_commit();
    copy4(512 + lane * 4, (const char*)p.q + 512 + lane * 4, words(p.k)[32 + lane]);
    copy_commit();
    copy_wait<1>();
    barrier();
    empty_out(p.out, 0, 512, 32);
    copy_wait<0>();
    barrier();
    empty_out((char*)p.out + 512, 512, 512, 32);
}

#elif defined(TEST_MEMORY)

// Loads and stores of each width, global and shared.
TEST(32) {
    const int lane = thread_index();
    const char* from = (const char*)p.q;
    u32* out = (u32*)p.out + lane * 20;
    out[0] = load_bits<1>(from + lane);
    out[1] = load_bits<2>(from + 2 * lane);
    out[2] = load_bits<4>(from + 4 * lane);
    store2(out + 3, words(p.q)[lane] ^ 0x55555555u);
    float x[4], y[2], z[1];
    load4(x, (const float*)p.q + 4 * lane);
    store4((float*)(out + 4), x);
    fill(0, p.q, 512, 32);
    for (int e = 0; e < 4; e++) shared_store(512 + (lane * 4 + e) * 4, x[3 - e]);
    barrier();
    shared_load(x, (lane ^ 1) * 16);
    shared_load(y, 512 + (lane ^ 2) * 16 + 8);
    shared_load(z, 512 + (lane ^ 4) * 16 + 4);
    for (int e = 0; e < 4; e++) out[8 + e] = bits_of(x[e]);
    out[12] = bits_of(y[0]), out[13] = bits_of(y[1]), out[14] = bits_of(z[0]);
    for (int e = 15; e < 20; e++) out[e] = 0;
}

#elif defined(TEST_MBARRIERS)

// One warp writes nine tiles into a ring of two, another one reads them: phases of both parities, over and over.
TEST(64) {
    constexpr u32 FULL = 512, EMPTY = FULL + 16;
    const int lane = thread_index() % 32;
    if (thread_index() == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(FULL + 8 * i, 32);
            mbarrier_init(EMPTY + 8 * i, 1);
        }
        mbarrier_init_fence();
    }
    barrier();
    for (int n = 0; n < 9; n++) {
        const u32 i = n % 2, parity = n / 2 & 1, at = i * 128 + lane * 4;
        if (thread_index() < 32) {
            mbarrier_wait(EMPTY + 8 * i, parity ^ 1);
            shared_store(at, ((const float*)p.q)[n * 32 + lane]);
            mbarrier_arrive(FULL + 8 * i);
        } else {
            float x[1];
            mbarrier_wait(FULL + 8 * i, parity);
            shared_load(x, i * 128 + (lane ^ 5) * 4);
            ((float*)p.out)[n * 32 + lane] = x[0];
            warp_barrier();
            if (lane == 0) mbarrier_arrive(EMPTY + 8 * i);
        }
    }
}

#elif defined(TEST_BARRIERS)

// Group 0 writes and only arrives, group 1 waits and reads, three times in turns; then each asks whether any has a flag.
TEST(256) {
    const int group = thread_index() / 128, i = thread_index() % 128;
    for (int n = 0; n < 3; n++) {
        if (group == 0) {
            if (n) named_barrier(2, 256);
            shared_store(i * 4, ((const float*)p.q)[n * 128 + i]);
            named_barrier_arrive(1, 256);
        } else {
            float x[1];
            named_barrier(1, 256);
            shared_load(x, (127 - i) * 4);
            ((float*)p.out)[n * 128 + i] = x[0];
            if (n < 2) named_barrier_arrive(2, 256);
        }
    }
    for (int n = 0; n < 3; n++) {
        const bool any = warpgroup_any(((const float*)p.q)[384 + n * 256 + thread_index()] > 0.5f, 3 + group);
        ((float*)p.out)[384 + n * 256 + thread_index()] = any ? 1.f : 0.f;
    }
}

#elif defined(TEST_REGISTERS)

// Registers move from one warpgroup to two others, which keep many numbers.
TEST(384) {
    const float* from = (const float*)p.q;
    const int i = thread_index();
    if (i < 128) {
        registers_down<24>();
        ((float*)p.out)[i] = from[i];
    } else {
        registers_up<240>();
        named_barrier(1, 256);  // both have theirs at the same time
        float x[160];
#pragma unroll
        for (int e = 0; e < 160; e++) x[e] = from[(i + e) % 384];
        for (int n = 0; n < p.Lk; n++)
#pragma unroll
            for (int e = 0; e < 160; e++) x[e] = x[e] + x[(e + 1) % 160] * 0.f;
        float sum = 0.f;
#pragma unroll
        for (int e = 0; e < 160; e++) sum += x[e];
        ((float*)p.out)[i] = sum;
    }
}

#elif defined(TEST_TENSOR_COPY)

// One box of p.Lk bytes from column p.B, row p.H, head p.Hk, batch p.Lq on.
TEST(128) {
    const u32 full = p.Lk;
    if (thread_index() == 0) {
        mbarrier_init(full, 1);
        mbarrier_init_fence();
    }
    barrier();
    if (thread_index() == 0) {
        mbarrier_arrive_expect(full, p.Lk);
        tensor_copy(0, maps.q, full, p.B, p.H, p.Hk, p.Lq);
    }
    mbarrier_wait(full, 0);
    empty_out(p.out, 0, p.Lk, 128);
}

#elif defined(TEST_WGMMA)

// Operands as p.q has them in shared memory, p.Lk bytes; a in registers from p.k, where A_STAYS. Panels of A_PANEL
// and B_PANEL bytes have PANEL_STEPS steps of 32 bytes of K; TURNED: b is transposed, and a step is 16 rows of it.
//
// p.chunks: not what operand() says of b but p.left, beside the address; 2 and more: of a as well. For looking for what
// would be right.
TEST(128) {
    fill(0, p.q, p.Lk, 128);
    mbarrier_init_fence();  // products see what threads have stored
    barrier();
    u64 a = operand<ROW_BYTES>(0), b = operand<ROW_BYTES>(B_BEGINS, TURNED ? B_PANEL : 16);
    if (p.chunks) b = (b & 0x3fff) | (u64)p.left;
    if (p.chunks > 1) a = (a & 0x3fff) | (u64)p.left;
#if A_STAYS
    u32 left[K_STEPS][4];
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
#pragma unroll
        for (int e = 0; e < 4; e++) left[step][e] = words(p.k)[(step * 128 + thread_index()) * 4 + e];
#endif
    SUM_TYPE d[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) d[i] = 77;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        const u32 inside = step % PANEL_STEPS * 32;
        const u64 right = onward(b, TURNED ? step * 16 * ROW_BYTES : step / PANEL_STEPS * B_PANEL + inside);
#if A_STAYS
        OF_GROUPS(d, left[step], right, step > 0);
#else
        OF_GROUPS(d, onward(a, step / PANEL_STEPS * A_PANEL + inside), right, step > 0);
#endif
    }
    wgmma_commit();
    wgmma_wait<0>(d);
#pragma unroll
    for (int i = 0; i < SUMS; i++) ((SUM_TYPE*)p.out)[thread_index() * SUMS + i] = d[i];
}

#endif
