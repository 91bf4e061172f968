// The call from Python: one kernel, SOURCE, of one variant.
#include SOURCE

namespace shim {
const char* launch(
    void (*)(), int blocks, int threads, u32 shared_bytes, int schedule, u32 seed, const void* const* ranges, int count
);
}

static const Params* params;
static const void* maps;  // Maps, of a kernel that takes them

extern "C" int params_size() { return sizeof(Params); }

extern "C" const char* run(
    const Params* p, const void* m, int blocks, int threads, u32 shared_bytes, int schedule, u32 seed,
    const void* const* ranges, int count
) {
    params = p;
    maps = m;
    const auto entry = [] { CALL_KERNEL(*params, maps); };
    return shim::launch(entry, blocks, threads, shared_bytes, schedule, seed, ranges, count);
}

extern "C" void counts(long* to) {
    to[0] = shim::state.matrix_reads;
    to[1] = shim::state.conflicts;
    to[2] = shim::state.products;
}
