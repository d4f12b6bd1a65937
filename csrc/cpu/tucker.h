// Mode-n products with every mode of a tensor, for the operators built on them.
#pragma once

#include "chain.h"

namespace lance {

// One matrix or nothing a mode.
template <typename T>
using Matrices = std::vector<std::optional<Matrix<T>>>;

template <typename T>
Matrices<T> projecting(const Factors& factors) {
  Matrices<T> matrices;
  for (const auto& factor : factors) {
    matrices.push_back(factor ? std::optional(projecting<T>(*factor)) : std::nullopt);
  }
  return matrices;
}

template <typename T>
Matrices<T> expanding(const Factors& factors) {
  Matrices<T> matrices;
  for (const auto& factor : factors) {
    matrices.push_back(factor ? std::optional(expanding<T>(*factor)) : std::nullopt);
  }
  return matrices;
}

// Every mode of x multiplied by its matrix, if it has one; contiguous, of `dtype`, which is that of x or T's.
template <typename T>
Tensor multiply_modes(const Tensor& x, Matrices<T> matrices, ScalarType dtype);

}  // namespace lance
