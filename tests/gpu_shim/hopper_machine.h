// What the machine of machine.h has of compute capability 9.0: mbarriers, tensor copies, named barriers, products that
// run by themselves.
#pragma once
#include "machine.h"

namespace shim {

// mbarriers, by their shared addresses. bytes: how many more the phase waits for.
void mbarrier_init(u32 at, int arrivals);
void mbarrier_arrive(u32 at, int bytes);
void mbarrier_wait(u32 at, u32 parity);

// A 4-dimensional array and a box of it, as the encoded map describes them. Strides in bytes.
struct TensorMap {
    const char* base;
    int size, columns;                    // bytes of an element; of the first axis
    int rows, heads, batches;
    int box_columns, box_rows;
    long long row_stride, head_stride, batch_stride;
};
void copy_box(u32 at, const TensorMap& map, u32 mbarrier, int column, int row, int head, int batch);

// Rows of 128 or 64 bytes: 16-byte chunks of a line of 128 bytes, numbered in 3 or 2 bits, change places by the line's
// number.
inline u32 swizzled(u32 at, u32 pitch) { return at ^ ((at >> 7 & (pitch == 128 ? 7 : 3)) << 4); }

void named_barrier(int id, int threads, bool wait);
bool named_any(int id, int threads, bool x);

// Products of the running warp: made at once (EARLY), or when the warp waits for their group.
struct Product {
    virtual void make() = 0;
    virtual ~Product() {}
};
void add_product(Product* product);  // which the machine deletes
void products_commit();
void products_wait(int groups);

}  // namespace shim
