// What machine.cpp has for the other parts of the machine, and kernels do not see.
#pragma once
#include "machine.h"

#include <functional>
#include <vector>

namespace shim {

// Waits in a queue, until somebody wakes its threads; or only until others have run.
void wait_in(std::vector<int>& queue);
void wake(std::vector<int>& queue);
void yield();

// Something that the machine does by itself: at once (EARLY), or when no thread can go on, in any order.
void by_engine(std::function<void()> work);

// Of hopper_machine.cpp: a new block starts with nothing; at its end nothing may be left over.
void hopper_start(int warps);
void hopper_end();

}  // namespace shim
