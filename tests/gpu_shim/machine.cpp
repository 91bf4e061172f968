// The machine of machine.h: fibers, the scheduler, barriers, warps, asynchronous copies, and the call from Python.
#include "scheduler.h"
#include "fiber.h"

#include <deque>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#error "address sanitizers do not know fibers"
#endif

namespace shim {

struct Copy {
    u32 to;
    const void* from;
    int n, bytes;
};
struct Thread {
    Fiber fiber;
    bool ended;
    std::vector<Copy> open;               // copies that no group holds yet
    std::deque<std::vector<Copy>> groups;
};
struct Warp {
    int alive, arrived;
    const char* what;
    void* slots[32];
    std::vector<int> waiting;
    std::deque<int> ready;
};
struct Range {
    const char* from;
    const char* to;
};

const long STACK = 64 * 1024;
State state;
static Fiber main_fiber;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<int> at_barrier, priority;
static std::vector<char> stacks, shared_store;
static std::vector<Range> readable;
static int alive, barrier_line;
static std::string error;
static u32 random_state;
static void (*kernel)();
static std::vector<std::function<void()>> engine;
static bool on_main = true;  // no fiber runs

struct Failure {};

static u32 random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}
static void shuffle(std::vector<int>& x) {
    for (size_t i = x.size(); i > 1; i--) std::swap(x[i - 1], x[random_number() % i]);
}

static void leave() { shim_switch(&threads[state.thread].fiber, &main_fiber); }

void fail(const char* format, ...) {
    char text[400], whole[480];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(whole, sizeof whole, "block %d, thread %d: %s", state.block, state.thread, text);
    error = whole;
    if (on_main) throw Failure();
    leave();
    __builtin_unreachable();
}

void wake(std::vector<int>& waiting) {
    for (int t : waiting) warps[t / 32].ready.push_back(t);
    waiting.clear();
}

void wait_in(std::vector<int>& queue) {
    queue.push_back(state.thread);
    leave();
}

void yield() {
    const int warp = state.thread / 32;
    for (size_t i = 0; i + 1 < priority.size() && random_number() % 8; i++) {  // its warp comes later, mostly last
        if (priority[i] == warp) std::swap(priority[i], priority[i + 1]);
    }
    warps[warp].ready.push_back(state.thread);
    leave();
}

void by_engine(std::function<void()> work) {
    if (state.early) {
        work();
    } else {
        engine.push_back(std::move(work));
    }
}

// One thing that the engine has to do, if there is any.
static bool run_engine() {
    if (engine.empty()) return false;
    std::swap(engine[random_number() % engine.size()], engine.back());
    const std::function<void()> work = std::move(engine.back());
    engine.pop_back();
    work();
    return true;
}

static void release_barrier() {
    if (alive && (int)at_barrier.size() == alive) wake(at_barrier);
}

void barrier(int line) {
    if (!at_barrier.empty() && barrier_line != line) {
        fail("barrier of line %d while others wait in that of line %d", line, barrier_line);
    }
    barrier_line = line;
    at_barrier.push_back(state.thread);
    release_barrier();
    leave();
}

void collective(const char* what, void* slot, void (*work)(void**)) {
    Warp& warp = warps[state.thread / 32];
    if (warp.arrived && strcmp(warp.what, what)) {
        fail("divergence: %s while others of the warp wait in %s", what, warp.what);
    }
    warp.what = what;
    warp.slots[state.thread % 32] = slot;
    if (++warp.arrived < 32) {
        if (warp.alive < 32) fail("%s in a warp of which threads have ended", what);
        warp.waiting.push_back(state.thread);
        leave();
    } else {
        warp.arrived = 0;
        work(warp.slots);
        wake(warp.waiting);
    }
}

void check_shared(u32 at, u32 bytes, u32 alignment, const char* what) {
    if (at % alignment) fail("%s: shared address %u is not a multiple of %u", what, at, alignment);
    if (at + bytes > state.shared_bytes) {
        fail("%s: shared address %u lies outside %u bytes", what, at, state.shared_bytes);
    }
}

void check_global(const void* from, int bytes, const char* what) {
    const char* begin = (const char*)from;
    for (const Range& range : readable) {
        if (begin >= range.from && begin + bytes <= range.to) return;
    }
    if (bytes) fail("%s: reads %d bytes outside the arrays", what, bytes);
}

static void land(std::vector<Copy>& copies) {
    for (const Copy& x : copies) {
        memcpy(state.shared + x.to, x.from, x.n);
        memset(state.shared + x.to + x.n, 0, x.bytes - x.n);
    }
    copies.clear();
}

void copy(u32 to, const void* from, int n, int bytes) {
    check_shared(to, bytes, bytes, "copy");
    check_global(from, n, "copy");
    if ((size_t)from % bytes) fail("copy: global address is not a multiple of %d", bytes);
    std::vector<Copy>& open = threads[state.thread].open;
    open.push_back({to, from, n, bytes});
    if (state.early) land(open);
}

void commit() {
    Thread& thread = threads[state.thread];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void wait(int groups) {
    Thread& thread = threads[state.thread];
    for (; (int)thread.groups.size() > groups; thread.groups.pop_front()) land(thread.groups.front());
}

static void thread_entry() {
    kernel();
    threads[state.thread].ended = true;
    alive--;
    warps[state.thread / 32].alive--;
    release_barrier();
    leave();
}

static void start_block(int n) {
    memset(state.shared, 0xff, state.shared_bytes);
    threads.clear();
    threads.resize(n);
    warps.clear();
    warps.resize(n / 32);
    at_barrier.clear();
    alive = n;
    engine.clear();
    hopper_start(n / 32);
    std::vector<int> order(n);
    priority.resize(n / 32);
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = 0; i < n / 32; i++) priority[i] = i;
    if (state.early) shuffle(order), shuffle(priority);
    for (int i : order) {
        threads[i].ended = false;
        fiber_start(&threads[i].fiber, &stacks[STACK * i], STACK, thread_entry);
        warps[i / 32].alive++;
        warps[i / 32].ready.push_back(i);
    }
}

// The thread that runs next, -1 if all have to wait.
static int next_thread() {
    static int turn;
    const int n = warps.size();
    for (int i = 0; i < n; i++) {
        const int w = state.early ? priority[i] : (turn + 1 + i) % n;
        if (warps[w].ready.empty()) continue;
        turn = w;
        const int t = warps[w].ready.front();
        warps[w].ready.pop_front();
        return t;
    }
    return -1;
}

static bool run_block(int n) {
    start_block(n);
    do {
        for (int t; (t = next_thread()) >= 0;) {
            state.thread = t;
            on_main = false;
            shim_switch(&main_fiber, &threads[t].fiber);
            on_main = true;
            if (!error.empty()) return false;
        }
    } while (run_engine());
    if (!alive) {
        hopper_end();
        return true;
    }
    char text[200];
    snprintf(text, sizeof text, "block %d: deadlock, %d threads wait, %d of them in the barrier of line %d",
             state.block, alive, (int)at_barrier.size(), barrier_line);
    error = text;
    return false;
}

// Empty message: all blocks ran. schedule: 0 LATE, 1 EARLY, 2 MIXED. ranges: pairs of addresses of readable global
// memory.
const char* launch(
    void (*entry)(), int blocks, int n, u32 shared_bytes, int schedule, u32 seed, const void* const* ranges, int count
) {
    error.clear();
    kernel = entry;
    stacks.resize(STACK * n);
    shared_store.resize(shared_bytes + 1024);
    state.shared = (unsigned char*)(((size_t)shared_store.data() + 1023) & ~(size_t)1023);
    state.shared_bytes = shared_bytes;
    state.early = schedule != 0;
    state.mixed = schedule == 2;
    random_state = seed * 2654435761u + 1;
    state.matrix_reads = state.conflicts = state.products = 0;
    readable.clear();
    for (int i = 0; i < count; i++) readable.push_back({(const char*)ranges[2 * i], (const char*)ranges[2 * i + 1]});
    for (state.block = 0; state.block < blocks; state.block++) {
        try {
            if (!run_block(n)) break;
        } catch (Failure) {
            break;
        }
    }
    return error.c_str();
}

}  // namespace shim
