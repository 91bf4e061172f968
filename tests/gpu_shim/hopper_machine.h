// What the machine of machine.h has of compute capability 9.0: mbarriers, named barriers, products that run by
// themselves.
#pragma once
#include "machine.h"

#include <functional>

namespace shim {

// mbarriers, by their shared addresses. bytes: how many more the phase waits for.
void mbarrier_init(u32 at, int arrivals);
void mbarrier_arrive(u32 at, int bytes);
void mbarrier_bytes(u32 at, int bytes);  // so many have landed
void mbarrier_wait(u32 at, u32 parity);

void named_barrier(int id, int threads, bool wait);
bool named_any(int id, int threads, bool x);

// Products of the running warp: made at once (EARLY), or when the warp waits for their group.
void add_product(std::function<void()> product);
void products_commit();
void products_wait(int groups);

// Of machine.cpp's blocks: a new one starts with nothing; at its end nothing may be left over.
void hopper_start(int warps);
void hopper_end();

}  // namespace shim
