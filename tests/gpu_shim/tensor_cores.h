// load_matrices and the products of tensor cores, of a warp: 32 lanes' registers <-> matrices.
//
// Compiled once, not with every variant: nothing here depends on one.
#pragma once
#include "machine.h"

namespace shim {

enum class Numbers { F16, BF16, S8, U8S8 };  // of both factors; or a without signs, b with

// r: four registers of this lane. at: the row that it names.
void load_four(u32* r, u32 at, bool transposed);

// d (16 x 8) += a b. d: four sums of this lane; float, or int of codes.
void multiply(Numbers numbers, void* d, const u32* a, u32 b0, u32 b1);

// Of a warpgroup: d (64 x columns) = a b + (add ? d : 0). d: columns / 2 sums of this lane. a: four registers, or 0 where
// the operand is `left`; b and left: operands as hopper.cuh makes them. by_rows: b lies row after row of K.
//
// Each warp makes its 16 rows by itself, when it gets there: nothing but the kernel's barriers keeps the warps of a
// warpgroup together. Registers and shared memory are read when a product is made, not when it is asked for.
void multiply_wide(Numbers numbers, int columns, void* d, const u32* a, u64 left, u64 b, bool add, bool by_rows);

}  // namespace shim
