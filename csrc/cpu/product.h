// The small matrix products every contraction is made of, and the conversions around them, once an instruction set.
#pragma once

#include <cstdint>

namespace lance {

// c (rows, columns) = [c +] a (rows, depth) b (depth, columns).
//
// The columns of b and c lie next to each other; a has any strides. Depth runs over two nested indices, since
// contracted modes are often not neighbours in memory: element (i, outer, inner) of a is
// a[i * a_row + outer * a_outer + inner * a_inner].
template <typename T>
struct Product {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t outer_depth = 1;
  int64_t inner_depth = 0;
  const T* a = nullptr;
  int64_t a_row = 0;
  int64_t a_outer = 0;
  int64_t a_inner = 0;
  const T* b = nullptr;
  int64_t b_outer = 0;
  int64_t b_inner = 0;
  T* c = nullptr;
  int64_t c_row = 0;
  bool accumulate = false;
};

// For tap t below taps (at most 9), lane by lane: sums[t * lanes + lane] += the sum over i and j of
// image[offsets[t] + i * image_row + j] * grad[i * grad_row + j], column j going to lane j % lanes.
template <typename T>
struct Correlation {
  const T* grad = nullptr;
  int64_t grad_row = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  const T* image = nullptr;
  int64_t image_row = 0;
  const int64_t* offsets = nullptr;
  int64_t taps = 0;
  T* sums = nullptr;
};

// The routines of one instruction set.
struct Routines {
  int64_t vector_bytes;
  void (*product_float)(const Product<float>&);
  void (*product_double)(const Product<double>&);
  void (*correlate_float)(const Correlation<float>&);
  void (*correlate_double)(const Correlation<double>&);
  // Between float and the 16-bit formats, given as their bits; `count` neighbours each.
  void (*widen_bfloat16)(const uint16_t* from, float* to, int64_t count);
  void (*widen_half)(const uint16_t* from, float* to, int64_t count);
  void (*narrow_bfloat16)(const float* from, uint16_t* to, int64_t count);
  void (*narrow_half)(const float* from, uint16_t* to, int64_t count);
  // to[j * to_row + i] = from[i * from_row + j] for i below rows and j below columns.
  void (*transpose_float)(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                          int64_t to_row);
};

// Those of the best instruction set this machine has; see capability().
const Routines& routines();

inline void product(const Product<float>& arguments) {
  routines().product_float(arguments);
}

inline void product(const Product<double>& arguments) {
  routines().product_double(arguments);
}

inline void correlate(const Correlation<float>& arguments) {
  routines().correlate_float(arguments);
}

inline void correlate(const Correlation<double>& arguments) {
  routines().correlate_double(arguments);
}

}  // namespace lance
