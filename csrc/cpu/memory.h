// Scratch memory, and copies between strided tensors of any floating dtype and dense rows of the accumulation type.
#pragma once

#include <algorithm>
#include <new>

#include "common.h"
#include "product.h"

namespace lance {

// Uninitialised, aligned to a cache line.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(
            static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(std::max<int64_t>(count, 1)), alignment))) {}
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    ::operator delete(data_, alignment);
  }

  T* data() const {
    return data_;
  }

 private:
  static constexpr std::align_val_t alignment{64};
  T* data_ = nullptr;
};

inline const uint16_t* bits_of(const void* data) {
  return static_cast<const uint16_t*>(data);
}

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline const void* offset_by(const void* data, ScalarType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

inline void* offset_by(void* data, ScalarType dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

template <typename T>
constexpr ScalarType dtype_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Converts `count` neighbours.
inline void widen(const void* from, ScalarType dtype, float* to, int64_t count) {
  if (dtype == ScalarType::BFloat16) {
    routines().widen_bfloat16(bits_of(from), to, count);
  } else if (dtype == ScalarType::Half) {
    routines().widen_half(bits_of(from), to, count);
  } else {
    std::copy_n(static_cast<const float*>(from), count, to);
  }
}

inline void widen(const void* from, ScalarType, double* to, int64_t count) {
  std::copy_n(static_cast<const double*>(from), count, to);
}

inline void narrow(const float* from, void* to, ScalarType dtype, int64_t count) {
  if (dtype == ScalarType::BFloat16) {
    routines().narrow_bfloat16(from, static_cast<uint16_t*>(to), count);
  } else if (dtype == ScalarType::Half) {
    routines().narrow_half(from, static_cast<uint16_t*>(to), count);
  } else {
    std::copy_n(from, count, static_cast<float*>(to));
  }
}

inline void narrow(const double* from, void* to, ScalarType, int64_t count) {
  std::copy_n(from, count, static_cast<double*>(to));
}

// to (rows, columns), dense rows `to_row` apart, from any strides and dtype.
template <typename T>
void gather(const void* from, ScalarType dtype, int64_t rows, int64_t row_stride, int64_t columns,
            int64_t column_stride, T* to, int64_t to_row) {
  if (column_stride == 1 || columns == 1) {
    for (int64_t row = 0; row < rows; ++row) {
      widen(offset_by(from, dtype, row * row_stride), dtype, to + row * to_row, columns);
    }
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (row_stride == 1 && dtype == ScalarType::Float) {
      const float* source = static_cast<const float*>(from);
      routines().transpose_float(source, column_stride, columns, rows, to, to_row);
      return;
    }
    if (row_stride == 1 && rows >= 8 && dtype != ScalarType::Double) {
      constexpr int64_t most_rows = 256;
      constexpr int64_t most_columns = 16;
      alignas(64) float widened[most_columns * most_rows];
      for (int64_t row = 0; row < rows; row += most_rows) {
        for (int64_t column = 0; column < columns; column += most_columns) {
          const int64_t high = std::min(most_rows, rows - row);
          const int64_t wide = std::min(most_columns, columns - column);
          for (int64_t c = 0; c < wide; ++c) {
            widen(offset_by(from, dtype, row + (column + c) * column_stride), dtype, widened + c * high, high);
          }
          routines().transpose_float(widened, high, wide, high, to + row * to_row + column, to_row);
        }
      }
      return;
    }
  }
  dispatch_floating(dtype, [&](auto value) {
    using S = decltype(value);
    const S* source = static_cast<const S*>(from);
    // Eight rows at a time keep the cache lines that a strided read shares between rows.
    for (int64_t row = 0; row < rows; row += 8) {
      const int64_t end = std::min(row + 8, rows);
      for (int64_t column = 0; column < columns; ++column) {
        for (int64_t r = row; r < end; ++r) {
          to[r * to_row + column] = static_cast<T>(source[r * row_stride + column * column_stride]);
        }
      }
    }
  });
}

// to[i...] = from[i...] for strided modes, converting to `dtype`; `from` has `strides`, `to` is dense in this order.
template <typename T>
void permute_copy(const T* from, const Sizes& sizes, const Sizes& strides, void* to, ScalarType dtype) {
  const int64_t modes = static_cast<int64_t>(sizes.size());
  int64_t outer = 1;
  for (int64_t mode = 0; mode + 1 < modes; ++mode) {
    outer *= sizes[mode];
  }
  const int64_t count = modes ? sizes.back() : 1;
  const int64_t stride = modes ? strides.back() : 1;
  dispatch_floating(dtype, [&](auto value) {
    using S = decltype(value);
    S* target = static_cast<S*>(to);
    for (int64_t index = 0; index < outer; ++index, target += count) {
      const T* source = from;
      int64_t rest = index;
      for (int64_t mode = modes - 2; mode >= 0; --mode) {
        source += rest % sizes[mode] * strides[mode];
        rest /= sizes[mode];
      }
      if (stride == 1) {
        if constexpr (std::is_same_v<T, double> == std::is_same_v<S, double>) {
          narrow(source, target, dtype, count);
        }
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        target[i] = static_cast<S>(source[i * stride]);
      }
    }
  });
}

inline int64_t count_of(const Sizes& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    check(!__builtin_mul_overflow(count, size, &count), "lance: a tensor of size ", shape_string(sizes),
          " has too many elements to count");
  }
  return count;
}

inline Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t mode = sizes.size(); mode-- > 0;) {
    strides[mode] = stride;
    stride *= sizes[mode];
  }
  return strides;
}

}  // namespace lance
