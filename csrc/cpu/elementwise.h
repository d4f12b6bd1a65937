// Elementwise routines of the companions over neighbours in memory, once an instruction set.
#pragma once

#include <cstdint>

namespace lance {

// What a piecewise linear activation does; its bit says that the derivative is one.
template <typename T>
struct Piecewise {
  enum Kind { relu, clamp, leaky } kind;
  T low = 0;
  T high = 0;
  T slope = 0;
};

// A derivative's evenly spaced values; see lance_kernels/ops/activation.py.
struct DerivativeGrid {
  enum Kind { gelu, gelu_tanh, silu, quick_gelu, hardswish, sigmoid, tanh, hardsigmoid } kind;
  int32_t steps;
  int32_t zero;
  int32_t missing;
};

// The routines for one type of accumulation. `count` neighbours each; masks start at a byte.
template <typename T>
struct ElementwiseOf {
  void (*activate)(const Piecewise<T>&, const T* x, T* y, uint8_t* mask, int64_t count);
  // to = from where the bit is set, else 0, or slope * from where `scaled`.
  void (*select)(const T* from, const uint8_t* mask, bool scaled, T slope, T* to, int64_t count);
  // to = from * scale + shift, the coefficients one or one an element.
  void (*affine)(const T* from, T scale, T shift, T* to, int64_t count);
  void (*affine_each)(const T* from, const T* scale, const T* shift, T* to, int64_t count);
  // to = (from * first) * second.
  void (*multiply)(const T* from, T first, T second, T* to, int64_t count);
  void (*multiply_each)(const T* from, const T* first, const T* second, T* to, int64_t count);
  void (*derivative_codes)(const DerivativeGrid&, const T* x, uint8_t* codes, int64_t count);
  void (*apply_codes)(const DerivativeGrid&, const T* from, const uint8_t* codes, T* to, int64_t count);
  // The largest of |x - center|, NaN where one is NaN; or one an element, kept in `largest`.
  T (*deviation)(const T* x, T center, int64_t count);
  void (*deviation_each)(const T* x, const T* center, T* largest, int64_t count);
  void (*quantize)(const T* x, T center, T inverse, int8_t* codes, int64_t count);
  void (*quantize_each)(const T* x, const T* center, const T* inverse, int8_t* codes, int64_t count);
  void (*dequantize)(const int8_t* codes, T step, T* to, int64_t count);
  // Max pooling's step: where a value beats the best so far (greater, or NaN), both are replaced.
  // `stride` is the distance of neighbouring values.
  void (*keep_larger)(const T* values, int64_t stride, uint8_t offset, T* best, uint8_t* offsets, int64_t count);
  void (*dequantize_each)(const int8_t* codes, const T* step, T* to, int64_t count);
};

struct Elementwise {
  ElementwiseOf<float> single;
  ElementwiseOf<double> wide;
};

// Those of the best instruction set this machine has; see capability().
const Elementwise& elementwise();

template <typename T>
const ElementwiseOf<T>& elementwise_of() {
  if constexpr (sizeof(T) == sizeof(double)) {
    return elementwise().wide;
  } else {
    return elementwise().single;
  }
}

}  // namespace lance
