// Attention of few query rows over many keys: keys are cut into chunks, a block takes one, and merge.cu joins what they
// leave. float16 and bfloat16; int8 q and k with v in 16 bits or int8.
//
//     the query rows of all heads that share a key and value head are the rows of one tile of 16
//     a warp has tiles of 32 keys of its own, every fourth of the chunk, in a ring that no other warp touches: it waits
//     for no other until the end, when the block joins the results in their order
//     beyond 128 channels a block is one team of two warps that share the keys and the ring; each has half of O
//
// Why on tensor cores. An H200 brings 4.3 TB/s, to each of 132 multiprocessors at 1.8 GHz 18 bytes a clock: 9 numbers
// of 16 bits, or 18 codes. Each is multiplied with 16 rows: 145 or 290 products a clock, where there are 128 units for
// float32 and a conversion of every number would come first; mma.sync makes 1024 or 2048, so this takes 14 %, and as
// much with one row of sixteen in use. The softmax of 16 x 32 scores takes some 200 instructions of a warp, 600 with
// codes; while the bytes of the tile arrive, the four schedulers have at D = 128 3700 slots, 1850 with codes, and at
// D = 64 half of that.
//
// What has to be on its way: 4.3 TB/s * 0.7 us = 3 MB, 23 KB a multiprocessor. A team has 2 STAGES - 1 tiles under way
// while it waits: at D = 128 in 16 bits 8 KB, times 4 teams and 2 blocks 64 KB.
// Registers of a thread: O DV / 2 <= 64, Q 16 or, in shared memory, none, S 16, int8 as many more, and 60 of addresses.
#include "warp_products.cuh"

constexpr int D = HEAD_DIM, ROWS = 16, KEYS = 32, THREADS = WARPS * 32;
constexpr int TEAMS = WARPS / TEAM, DV = D / TEAM;  // each warp of a team has DV channels of O
constexpr int QK_PITCH = D * QK_SIZE, V_PITCH = DV * V_SIZE;
constexpr int STEPS = QK_PITCH / 32;
constexpr bool Q_STAYS = STEPS <= 4;  // 16 registers
// Shared memory: Q; the (m, l) of each team's rows; rings. A stage of a ring: K, V of each warp and, of codes, scales.
constexpr u32 AT_STATE = ROWS * QK_PITCH, AT_RINGS = AT_STATE + TEAMS * ROWS * 8;
constexpr u32 AT_V = KEYS * QK_PITCH, V_BYTES = KEYS * V_PITCH, AT_K_SCALE = AT_V + TEAM * V_BYTES;
constexpr u32 AT_V_SCALE = AT_K_SCALE + (CODES ? KEYS * 4 : 0);
constexpr u32 STAGE = AT_V_SCALE + (CODED_P ? KEYS * 4 : 0), RING = STAGES * STAGE;
constexpr u32 O_PITCH = (D + 8) * 4;  // rows of O begin 8 banks apart, in the ring of the team that has done with it
static_assert(RING >= ROWS * O_PITCH && RING % 128 == 0 && AT_RINGS % 128 == 0 && QK_PITCH % 32 == 0, "tiles");
static_assert(DV % 16 == 0 && (TEAM == 1 || TEAMS == 1), "teams");

DEVICE void team_barrier() {
    if (TEAM == 1) {
        warp_barrier();
    } else {
        barrier();
    }
}

// A chunk of the keys of one key and value head, and up to 16 of the rows that read it.
struct Part {
    int b, kv, chunk;
    int rows, row;                 // of the head's group, heads by heads, and the first of them that is here
    int begin, end;                // tiles of keys that some row sees
    int whole_from, whole_to;      // the first and the last key that every row sees, by causal and window
};

DEVICE Part make_part(const Params& p, int block) {
    Part part;
    part.rows = p.H / p.Hk * p.Lq;
    const int tiles = (part.rows + ROWS - 1) / ROWS;  // beside each other: they read the same keys
    part.row = block % tiles * ROWS;
    part.chunk = block / tiles % p.chunks;
    part.kv = block / tiles / p.chunks % p.Hk;
    part.b = block / tiles / p.chunks / p.Hk;
    const long long first = (long long)part.chunk * p.chunk;
    const int low = (int)max((long long)first_key(p, 0), first);
    const int high = (int)min((long long)last_key(p, p.Lq - 1), first + p.chunk - 1);
    part.begin = low / KEYS;
    part.end = low <= high ? high / KEYS + 1 : part.begin;
    part.whole_from = first_key(p, p.Lq - 1);
    part.whole_to = last_key(p, 0);
    return part;
}

// Row r of the group: its query head, its place there, and its place among all rows.
struct Row {
    int h, i;
    long long index;
};
DEVICE Row find_row(const Params& p, const Part& part, int r) {
    const int at = min(part.row + r, part.rows - 1), head = at / p.Lq;
    return {part.kv * (p.H / p.Hk) + head, at % p.Lq, ((long long)part.b * p.Hk + part.kv) * part.rows + at};
}

DEVICE float score_factor(const Params& p, int b, int h, int i) {
    if (!CODES) return p.scale;
    return p.scale * p.q_scale[b * p.q_scale_stride[0] + h * p.q_scale_stride[1] + i * p.q_scale_stride[2]];
}

DEVICE void copy_q(const Params& p, const Part& part) {
    constexpr int CHUNKS = QK_PITCH / 16, EACH = 16 / QK_SIZE;
    for (int c = thread_index(); c < ROWS * CHUNKS; c += THREADS) {
        const int r = c / CHUNKS, column = c % CHUNKS * EACH;  // chunks of 16 bytes here
        const Row row = find_row(p, part, r);
        const long long at = part.b * p.q_stride[0] + row.h * p.q_stride[1] + row.i * p.q_stride[2] + column;
        const int n = part.row + r < part.rows ? min(max(p.D - column, 0), EACH) : 0;
        copy_chunk<QK_SIZE, ALIGNED>(place<QK_PITCH>(r, c % CHUNKS), (const char*)p.q + at * QK_SIZE, n);
    }
}

// A tile of COLUMNS columns, by one team.
template <int SIZE, int COLUMNS> DEVICE void copy_keys(
    u32 to, const void* x, const long long* stride, const Params& p, const Part& part, int tile, int column
) {
    const char* from = (const char*)x + (part.b * stride[0] + part.kv * stride[1] + column) * SIZE;
    copy_tile<KEYS, COLUMNS * SIZE, SIZE, TEAM * 32, ALIGNED>(
        to, from, stride[2], tile * KEYS, p.Lk, p.D - column, thread_index() % (TEAM * 32));
}
DEVICE void copy_scales(u32 to, const float* x, const long long* stride, const Params& p, const Part& part, int tile) {
    const float* from = x + part.b * stride[0] + part.kv * stride[1];
    copy_numbers<KEYS, TEAM * 32>(to, from, stride[2], tile * KEYS, p.Lk, thread_index() % (TEAM * 32));
}
// A group of copies each, of nothing where there is no such tile, so that the number of groups tells which have landed.
DEVICE void copy_k(const Params& p, const Part& part, int tile, u32 stage) {
    if (tile < part.end) {
        copy_keys<QK_SIZE, D>(stage, p.k, p.k_stride, p, part, tile, 0);
        if (CODES) copy_scales(stage + AT_K_SCALE, p.k_scale, p.k_scale_stride, p, part, tile);
    }
    copy_commit();
}
DEVICE void copy_v(const Params& p, const Part& part, int tile, u32 stage) {
    if (tile < part.end) {
#pragma unroll
        for (int i = 0; i < TEAM; i++) {
            copy_keys<V_SIZE, DV>(stage + AT_V + i * V_BYTES, p.v, p.v_stride, p, part, tile, i * DV);
        }
        if (CODED_P) copy_scales(stage + AT_V_SCALE, p.v_scale, p.v_scale_stride, p, part, tile);
    }
    copy_commit();
}

// What a chunk leaves of row `index`: O, weighted by 2^((s - m) unit), and behind all of those m and l.
DEVICE float* place_of_o(const Params& p, long long index, int chunk) {
    return p.workspace + (index * p.chunks + chunk) * D;
}
DEVICE float* place_of_state(const Params& p, long long index, int chunk) {
    return p.workspace + (long long)p.B * p.H * p.Lq * p.chunks * D + (index * p.chunks + chunk) * 2;
}

KERNEL(cyflash_decode, THREADS, BLOCKS) {
    const int warp = thread_index() / 32, lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    const int team = warp / TEAM, member = warp % TEAM;
    const Part part = make_part(p, block_index());
    const u32 ring = AT_RINGS + team * RING;
    if (part.begin >= part.end) {  // no row sees a key: O is not read
        if (thread_index() < min(ROWS, part.rows - part.row)) {
            float* state = place_of_state(p, find_row(p, part, thread_index()).index, part.chunk);
            state[0] = -INFINITY;
            state[1] = 0.f;
        }
        return;
    }
    copy_q(p, part);
    copy_commit();
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
        copy_k(p, part, part.begin + team + stage * TEAMS, ring + stage * STAGE);
        copy_v(p, part, part.begin + team + stage * TEAMS, ring + stage * STAGE);
    }

    Head head[2];
    Rows rows[1];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const Row row = find_row(p, part, g + 8 * h);
        head[h] = make_head(p, part.b, row.h);
        begin_row(rows[0], h, p, part.b, row.h, row.i);
    }
    float o[1][DV / 2];
#pragma unroll
    for (int i = 0; i < DV / 2; i++) o[0][i] = 0.f;

    copy_wait<2 * STAGES>();
    barrier();  // Q is there
    u32 q[Q_STAYS ? STEPS : 1][1][4];
#pragma unroll
    for (int step = 0; step < (Q_STAYS ? STEPS : 0); step++) load_rows<1, QK_PITCH>(q[step], 0, step);

    u32 stage = ring;
#pragma unroll 1
    for (int j = part.begin + team; j < part.end; j += TEAMS) {
        copy_wait<2 * STAGES - 1>();
        team_barrier();  // K is there
        Sum sums[1][KEYS / 2];
        float s[1][KEYS / 2];
        // four steps at a time: of 16 together, at D = 256 in 16 bits, the operands do not fit beside O
        multiply_qk<1, QK_PITCH, KEYS, Q_STAYS, 4>(sums, q, 0, stage);
        const bool partial = j * KEYS < part.whole_from || j * KEYS + KEYS - 1 > part.whole_to;
        const bool hiding = HIDING && (BIAS || MASK || partial);
        soften<KEYS, ZERO>(s[0], sums[0], rows[0], p, head[0], head[1], j * KEYS, stage + AT_K_SCALE, partial,
                           hiding && !CODED_P);
        team_barrier();  // all have done with K
        copy_k(p, part, j + STAGES * TEAMS, stage);
        if (warp_any(rows[0].alpha[0] != 1.f || rows[0].alpha[1] != 1.f)) {  // seldom after the first tiles
#pragma unroll
            for (int i = 0; i < DV / 2; i++) o[0][i] *= rows[0].alpha[i / 2 % 2];
        }

        copy_wait<2 * STAGES - 1>();
        team_barrier();  // V is there
        if constexpr (CODED_P) {
            scale_to_codes<KEYS>(s[0], rows[0], stage + AT_V_SCALE);
            multiply_codes<1, DV, KEYS>(o, s, rows, stage + AT_V + member * V_BYTES);
        } else {
            multiply_pv<1, DV, KEYS>(o, s, stage + AT_V + member * V_BYTES, hiding);
        }
        team_barrier();  // all have done with V
        copy_v(p, part, j + STAGES * TEAMS, stage);
        stage = stage + STAGE == ring + RING ? ring : stage + STAGE;
    }

    // every tile of this team has been used, so its ring is free
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float sum = row_sum(rows[0].l[h]);
        if (t == 0 && member == 0) {
            shared_store(AT_STATE + (team * ROWS + g + 8 * h) * 8, rows[0].m[h]);
            shared_store(AT_STATE + (team * ROWS + g + 8 * h) * 8 + 4, sum);
        }
#pragma unroll
        for (int n = 0; n < DV / 16; n++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const u32 at = ring + (g + 8 * h) * O_PITCH + (member * DV + channel_of(n, pair)) * 4;
                shared_store(at, o[0][first_of(n, pair) + 2 * h]);
                shared_store(at + 4, o[0][second_of(n, pair) + 2 * h]);
            }
    }
    barrier();  // the teams' results are there
    for (int at = thread_index(); at < ROWS * (D / 4); at += THREADS) {
        const int r = at / (D / 4), channel = at % (D / 4) * 4;
        if (part.row + r >= part.rows) break;
        const Row row = find_row(p, part, r);
        const float unit = log2_unit(score_factor(p, part.b, row.h, row.i));
        float highest = -INFINITY, total = 0.f, sums[4] = {0, 0, 0, 0};
#pragma unroll
        for (int w = 0; w < TEAMS; w++) {
            float state[2];
            shared_load(state, AT_STATE + (w * ROWS + r) * 8);
            highest = fmaxf(highest, state[0]);
        }
#pragma unroll
        for (int w = 0; w < TEAMS; w++) {
            float state[2], x[4];
            shared_load(state, AT_STATE + (w * ROWS + r) * 8);
            shared_load(x, AT_RINGS + w * RING + r * O_PITCH + channel * 4);
            const float share = rescale<EXACT>(state[0], stand_in(highest), unit);
            total = fmaf(state[1], share, total);
#pragma unroll
            for (int e = 0; e < 4; e++) sums[e] = fmaf(x[e], share, sums[e]);
        }
        store4(place_of_o(p, row.index, part.chunk) + channel, sums);
        if (channel == 0) {
            float* state = place_of_state(p, row.index, part.chunk);
            state[0] = highest;
            state[1] = total;
        }
    }
}
