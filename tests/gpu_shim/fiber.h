// A fiber: a stack of its own, and the switch from one to another. Assembly on x86-64, ucontext elsewhere.
#pragma once
#include <stdint.h>

#if defined(__x86_64__)

struct Fiber {
    void* stack_pointer;
};

// Saves what a function must keep in `from`, goes on where `to` was left.
extern "C" void shim_switch(Fiber* from, const Fiber* to);
asm(R"(
.text
.local shim_switch
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// The first switch to the fiber calls `entry`, which never returns.
inline void fiber_start(Fiber* fiber, char* stack, long bytes, void (*entry)()) {
    void** top = (void**)((uintptr_t)(stack + bytes) & ~(uintptr_t)63);
    *--top = nullptr;       // where entry would return to: keeps its stack aligned
    *--top = (void*)entry;
    fiber->stack_pointer = top - 6;
}

#else

#include <ucontext.h>

struct Fiber {
    ucontext_t context;
};

inline void shim_switch(Fiber* from, const Fiber* to) { swapcontext(&from->context, &to->context); }

inline void fiber_start(Fiber* fiber, char* stack, long bytes, void (*entry)()) {
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = bytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, entry, 0);
}

#endif
