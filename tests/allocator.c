/* A C library's allocator, preloaded before the real one: it makes one allocation fail, or puts each at the end of
   accessible memory. Both only for the modules that are watched, by where they call from: OpenMP's own runtime, which
   ends the process without memory, is not among them. Needs glibc. */
#define _GNU_SOURCE
#include <errno.h>
#include <link.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

enum { MODULES = 64, FENCED = 256, PAGE = 4096, UNUSED = 0xa5 };
static struct { uintptr_t begin, end; size_t least; } watched[MODULES];
static size_t least_now;
static int modules, fencing;
static atomic_long left, live;
static struct { _Atomic(char *) data; size_t size, rest, whole; char *memory; } fenced[FENCED];

static int note(struct dl_phdr_info *info, size_t size, void *part) {
    if (!strstr(info->dlpi_name, part) || modules == MODULES) return 0;
    watched[modules].begin = UINTPTR_MAX, watched[modules].end = 0, watched[modules].least = least_now;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        uintptr_t begin = info->dlpi_addr + segment->p_vaddr;
        if (segment->p_type != PT_LOAD) continue;
        if (begin < watched[modules].begin) watched[modules].begin = begin;
        if (begin + segment->p_memsz > watched[modules].end) watched[modules].end = begin + segment->p_memsz;
    }
    modules++;
    return 0;
}

/* Watches the modules whose paths contain `part`, for requests of `least` bytes; returns how many there are now. */
int allocator_watch(char *part, size_t least) {
    least_now = least;
    dl_iterate_phdr(note, part);
    return modules;
}

/* Watches no module any more. */
void allocator_forget(void) { modules = 0; }

/* The n-th allocation from now on fails, none for 0. */
void allocator_fail(long n) { left = n; }

/* How many allocations are left until the one that fails: 0, it has. */
long allocator_left(void) { return left > 0 ? left : 0; }

/* Blocks allocated and not freed, of the whole process. */
long allocator_live(void) { return live; }

/* Whether to put what is allocated between two inaccessible pages, flush with the second. */
void allocator_fence(int on) { fencing = on; }

static int is_watched(void *caller, size_t size) {
    for (int i = 0; i < modules; i++)
        if (watched[i].begin <= (uintptr_t)caller && (uintptr_t)caller < watched[i].end) return size >= watched[i].least;
    return 0;
}

static int fails(void *caller, size_t size) {
    if (left <= 0 || !is_watched(caller, size) || atomic_fetch_sub(&left, 1) != 1) return 0;
    errno = ENOMEM;
    return 1;
}

/* Flush with the second page, or by turns 16 bytes beyond a multiple of 64, as little as malloc has to align. What is
   left up to the page has to be as it was when the block is freed. */
static void *between_pages(size_t size) {
    static atomic_uint turn;
    size_t back = turn++ % 2 ? (size + 15) / 64 * 64 + 48 : (size + 15) / 16 * 16;
    size_t room = (back + PAGE - 1) / PAGE * PAGE, whole = room + 2 * PAGE;
    for (int i = 0; i < FENCED; i++) {
        char *none = NULL, *memory;
        if (!atomic_compare_exchange_strong(&fenced[i].data, &none, (char *)1)) continue;
        memory = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory + PAGE, room, PROT_READ | PROT_WRITE)) return NULL;
        fenced[i].memory = memory, fenced[i].whole = whole, fenced[i].size = size, fenced[i].rest = back - size;
        memory += PAGE + room - back;
        memset(memory + size, UNUSED, back - size);
        return fenced[i].data = memory;
    }
    return NULL;  /* more than this file has room for: callers notice */
}

void *malloc(size_t size) {
    void *caller = __builtin_return_address(0), *block;
    if (fails(caller, size)) return NULL;
    if (fencing && is_watched(caller, size)) return between_pages(size);
    block = __libc_malloc(size);
    live += block != NULL;
    return block;
}

void *calloc(size_t n, size_t size) {
    void *caller = __builtin_return_address(0), *block;
    if (fails(caller, n * size)) return NULL;
    if (fencing && is_watched(caller, n * size)) return between_pages(n * size);
    block = __libc_calloc(n, size);
    live += block != NULL;
    return block;
}

void *realloc(void *old, size_t size) {
    void *block;
    if (fails(__builtin_return_address(0), size)) return NULL;
    block = __libc_realloc(old, size);
    live += (block != NULL) - (old != NULL && (block != NULL || size == 0));
    return block;
}

static void *aligned(void *caller, size_t alignment, size_t size) {
    void *block = fails(caller, size) ? NULL : __libc_memalign(alignment, size);
    live += block != NULL;
    return block;
}

void *memalign(size_t alignment, size_t size) { return aligned(__builtin_return_address(0), alignment, size); }
void *aligned_alloc(size_t alignment, size_t size) { return aligned(__builtin_return_address(0), alignment, size); }

int posix_memalign(void **to, size_t alignment, size_t size) {
    void *block = aligned(__builtin_return_address(0), alignment, size);
    if (block == NULL) return ENOMEM;
    *to = block;
    return 0;
}

void free(void *block) {
    if (block == NULL) return;
    for (int i = 0; fencing && i < FENCED; i++)
        if (fenced[i].data == block) {
            for (size_t n = 0; n < fenced[i].rest; n++)
                if (((unsigned char *)block)[fenced[i].size + n] != UNUSED) abort();
            munmap(fenced[i].memory, fenced[i].whole);
            fenced[i].data = NULL;
            return;
        }
    live--;
    __libc_free(block);
}
