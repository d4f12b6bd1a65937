// Tensors read in a given order of their dimensions, slowest first: lance_kernels/ops/_layout.py in C++.
#pragma once

#include "common.h"

namespace lance {

// Refuses an order that is no permutation of the dimensions of `x`.
void check_order(const char* operation, const Tensor& x, const Sizes& order);

// `x` with its dimensions permuted to `order`, contiguous; a view where `x` already lies so.
Tensor in_order(const Tensor& x, const Sizes& order);

// Undoes the permutation of in_order, as a view.
Tensor from_order(const Tensor& flat, const Sizes& order);

// Uninitialised, of the shape of `x` permuted to `order`; from_order makes it a result.
Tensor empty_in_order(const Tensor& x, const Sizes& order);

}  // namespace lance
