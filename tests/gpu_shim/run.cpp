// The call from Python: one kernel, SOURCE, of one variant.
#include SOURCE

namespace shim {
const char* launch(
    void (*)(), int blocks, int threads, u32 shared_bytes, int early, u32 seed, const void* const* ranges, int count
);
}

static const Params* params;

extern "C" int params_size() { return sizeof(Params); }

extern "C" const char* run(
    const Params* p, int blocks, int threads, u32 shared_bytes, int early, u32 seed, const void* const* ranges,
    int count
) {
    params = p;
    return shim::launch([] { kernel_entry(*params); }, blocks, threads, shared_bytes, early, seed, ranges, count);
}

extern "C" void counts(long* to) {
    to[0] = shim::state.matrix_reads;
    to[1] = shim::state.conflicts;
    to[2] = shim::state.products;
}
