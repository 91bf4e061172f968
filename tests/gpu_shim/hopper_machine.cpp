// The parts of hopper_machine.h.
#include "hopper_machine.h"
#include "scheduler.h"

#include <deque>
#include <map>
#include <memory>
#include <string.h>

namespace shim {

struct Mbarrier {
    int arrivals, missing;  // of a phase; that have not come
    long bytes;             // that are missing
    u32 parity;             // of the current phase
    std::vector<int> waiting;
};
struct NamedBarrier {
    int arrived = 0, threads = 0;
    bool any = false;
    std::vector<int> waiting;
    std::vector<bool*> results;
};
struct Products {
    std::vector<std::shared_ptr<Product>> open;  // that no group holds yet
    std::deque<std::vector<std::shared_ptr<Product>>> groups;
};

static std::map<u32, Mbarrier> mbarriers;
static std::map<int, NamedBarrier> named;
static std::vector<Products> products;

void hopper_start(int warps) {
    mbarriers.clear();
    named.clear();
    products.clear();
    products.resize(warps);
}

void hopper_end() {
    for (auto& [at, x] : mbarriers) {
        if (x.bytes) fail("mbarrier %u: %ld bytes are missing at the end", at, x.bytes);
    }
    for (auto& [id, x] : named) {
        if (x.arrived) fail("named barrier %d: %d threads have arrived at the end", id, x.arrived);
    }
    for (auto& x : products) {
        if (!x.open.empty() || !x.groups.empty()) fail("products that nobody has waited for");
    }
}

static Mbarrier& mbarrier(u32 at) {
    check_shared(at, 8, 8, "mbarrier");
    const auto found = mbarriers.find(at);
    if (found == mbarriers.end()) fail("mbarrier %u is used before it is initialised", at);
    return found->second;
}

static void end_phase(u32 at, Mbarrier& x) {
    if (x.missing < 0) fail("mbarrier %u: more arrivals than %d", at, x.arrivals);
    if (x.missing || x.bytes) return;
    x.parity ^= 1;
    x.missing = x.arrivals;
    wake(x.waiting);
}

void mbarrier_init(u32 at, int arrivals) {
    check_shared(at, 8, 8, "mbarrier_init");
    mbarriers[at] = {arrivals, arrivals, 0, 0, {}};
}

void mbarrier_arrive(u32 at, int bytes) {
    Mbarrier& x = mbarrier(at);
    x.bytes += bytes;
    x.missing--;
    end_phase(at, x);
    if (state.mixed) yield();
}

// So many have landed.
static void mbarrier_bytes(u32 at, int bytes) {
    Mbarrier& x = mbarrier(at);
    x.bytes -= bytes;
    end_phase(at, x);
}

void mbarrier_wait(u32 at, u32 parity) {
    Mbarrier& x = mbarrier(at);
    while (x.parity == parity) wait_in(x.waiting);
}

void copy_box(u32 at, const TensorMap& map, u32 mbarrier, int column, int row, int head, int batch) {
    const u32 pitch = map.box_columns * map.size;
    if (pitch != 128 && pitch != 64) fail("tensor_copy: rows of %u bytes", pitch);
    if (map.box_rows > 256) fail("tensor_copy: box of %d rows", map.box_rows);
    if ((size_t)map.base % 16 || map.row_stride % 16 || map.head_stride % 16 || map.batch_stride % 16) {
        fail("tensor_copy: array is not aligned to 16 bytes");
    }
    check_shared(at, pitch * map.box_rows, 1024, "tensor_copy");
    by_engine([=] {
        for (int r = 0; r < map.box_rows; r++)
            for (int c = 0; c < map.box_columns; c++) {
                const bool inside = column + c >= 0 && column + c < map.columns && row + r >= 0 && row + r < map.rows &&
                                    head < map.heads && batch < map.batches;
                unsigned char* to = state.shared + swizzled(at + r * pitch + c * map.size, pitch);
                const char* from = map.base + (long long)(column + c) * map.size + (row + r) * map.row_stride +
                                   head * map.head_stride + batch * map.batch_stride;
                if (inside) memcpy(to, from, map.size);
                else memset(to, 0, map.size);
            }
        mbarrier_bytes(mbarrier, pitch * map.box_rows);
    });
    if (state.mixed) yield();
}

static NamedBarrier& arrive(int id, int threads) {
    if (id < 1 || id > 15) fail("named barrier %d: expected 1 to 15", id);
    NamedBarrier& x = named[id];
    if (x.arrived && x.threads != threads) fail("named barrier %d: %d threads and %d", id, x.threads, threads);
    x.threads = threads;
    x.arrived++;
    return x;
}

static bool is_last(NamedBarrier& x) {
    if (x.arrived < x.threads) return false;
    x.arrived = 0;
    wake(x.waiting);
    return true;
}

void named_barrier(int id, int threads, bool wait) {
    NamedBarrier& x = arrive(id, threads);
    if (!is_last(x) && wait) wait_in(x.waiting);
}

bool named_any(int id, int threads, bool mine) {
    NamedBarrier& x = arrive(id, threads);
    bool result = false;
    x.any |= mine;
    x.results.push_back(&result);
    if (is_last(x)) {
        for (bool* to : x.results) *to = x.any;
        x.results.clear();
        x.any = false;
    } else {
        wait_in(x.waiting);
    }
    return result;
}

void add_product(Product* product) {
    std::shared_ptr<Product> mine(product);
    if (state.early && !state.mixed) {
        mine->make();
        mine.reset();  // what is waited for has been made
    }
    products[state.thread / 32].open.push_back(std::move(mine));
}

void products_commit() {
    Products& mine = products[state.thread / 32];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

void products_wait(int groups) {
    Products& mine = products[state.thread / 32];
    for (; (int)mine.groups.size() > groups; mine.groups.pop_front()) {
        for (auto& product : mine.groups.front()) {
            if (product) product->make();
        }
    }
}

}  // namespace shim
