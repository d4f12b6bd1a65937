// Elementwise work over neighbours in memory, spread over the threads in pieces whose masks start at a byte.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "layout.h"
#include "memory.h"

namespace lance {

constexpr int64_t block_size = 1024;
constexpr int64_t blocks_a_thread = 32;

// Calls body(from, to, index, count) for pieces of [0, total): `from` the elements from `index` on in type T, `to`
// where the results go. Pieces start at multiples of block_size; those of 16-bit dtypes are no longer than that.
template <typename T, typename Body>
void map_blocks(const void* from, void* to, ScalarType dtype, int64_t total, const Body& body) {
  const int64_t blocks = (total + block_size - 1) / block_size;
  parallel_for(0, blocks, blocks_a_thread, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * block_size, total);
    if (dtype == dtype_of<T>) {
      const int64_t begin = first * block_size;
      body(static_cast<const T*>(from) + begin, static_cast<T*>(to) + begin, begin, end - begin);
      return;
    }
    alignas(64) T widened[block_size];
    alignas(64) T result[block_size];
    for (int64_t index = first * block_size; index < end; index += block_size) {
      const int64_t count = std::min(block_size, end - index);
      widen(offset_by(from, dtype, index), dtype, widened, count);
      body(widened, result, index, count);
      narrow(result, offset_by(to, dtype, index), dtype, count);
    }
  });
}

// The same without results: body(from, index, count).
template <typename T, typename Body>
void read_blocks(const void* from, ScalarType dtype, int64_t total, const Body& body) {
  const int64_t blocks = (total + block_size - 1) / block_size;
  parallel_for(0, blocks, blocks_a_thread, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * block_size, total);
    if (dtype == dtype_of<T>) {
      const int64_t begin = first * block_size;
      body(static_cast<const T*>(from) + begin, begin, end - begin);
      return;
    }
    alignas(64) T widened[block_size];
    for (int64_t index = first * block_size; index < end; index += block_size) {
      const int64_t count = std::min(block_size, end - index);
      widen(offset_by(from, dtype, index), dtype, widened, count);
      body(widened, index, count);
    }
  });
}

// A tensor's values as T, in logical order.
template <typename T>
std::vector<T> values_of(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<T> values(static_cast<size_t>(dense.numel()));
  dispatch_floating(dense.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    const S* from = static_cast<const S*>(dense.const_data_ptr());
    std::transform(from, from + values.size(), values.begin(), [](S value) { return static_cast<T>(value); });
  });
  return values;
}

// Bytes of a mask with one bit an element.
inline int64_t mask_bytes(const Tensor& x) {
  return (x.numel() + 7) / 8;
}

inline void check_mask(const char* operation, const Tensor& mask, const Tensor& x) {
  if (mask.scalar_type() != ScalarType::Byte || mask.dim() != 1 || mask.size(0) != mask_bytes(x)) {
    check(false, "lance::", operation, ": mask has dtype ", dtype_name(mask.scalar_type()), " and shape ",
          shape_string(mask), "; expected torch.uint8 and ", shape_string(Sizes{mask_bytes(x)}),
          ", one bit an element of ", shape_string(x));
  }
}

}  // namespace lance
