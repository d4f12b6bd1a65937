#include <limits>
#include <tuple>

#include "blocks.h"

namespace lance {
namespace {

// Memory as (outer, rows, inner).
struct Rows {
  int64_t outer;
  int64_t rows;
  int64_t inner;
};

template <typename T>
class Reader {
 public:
  Reader(const Tensor& flat) : data_(flat.const_data_ptr()), dtype_(flat.scalar_type()) {}

  // Calls body(from, index, count) for [begin, end) in pieces.
  template <typename Body>
  void each(int64_t begin, int64_t end, const Body& body) const {
    if (dtype_ == dtype_of<T>) {
      body(static_cast<const T*>(data_) + begin, begin, end - begin);
      return;
    }
    alignas(64) T widened[block_size];
    for (int64_t index = begin; index < end; index += block_size) {
      const int64_t count = std::min(block_size, end - index);
      widen(offset_by(data_, dtype_, index), dtype_, widened, count);
      body(widened, index, count);
    }
  }

 private:
  const void* data_;
  ScalarType dtype_;
};

template <typename T>
T larger(T left, T right) {
  return left != left || left > right ? left : right;
}

// A row that holds NaN or an infinity comes back as NaN, one whose step has no finite inverse as zero.
template <typename T>
float step_of(T largest) {
  if (!(largest <= std::numeric_limits<T>::max())) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float step = static_cast<float>(largest / 127);
  return 1 / step <= std::numeric_limits<float>::max() ? step : 0;
}

template <typename T>
T step_inverse(float step) {
  return step > 0 ? T(1) / static_cast<T>(step) : T(0);
}

// Each row on its own: two passes over a row, which stays in cache where it is short.
template <typename T>
void quantize_stretches(const Rows& layout, const Reader<T>& x, const std::vector<T>& center, int8_t* codes,
                        float* steps) {
  const auto& routines = elementwise_of<T>();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, layout.outer * layout.inner));
  parallel_for(0, layout.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      T largest = 0;
      for (int64_t outer = 0; outer < layout.outer; ++outer) {
        const int64_t begin = (outer * layout.rows + row) * layout.inner;
        x.each(begin, begin + layout.inner, [&](const T* from, int64_t, int64_t count) {
          largest = larger(routines.deviation(from, center[row], count), largest);
        });
      }
      steps[row] = step_of(largest);
      const T inverse = step_inverse<T>(steps[row]);
      for (int64_t outer = 0; outer < layout.outer; ++outer) {
        const int64_t begin = (outer * layout.rows + row) * layout.inner;
        x.each(begin, begin + layout.inner, [&](const T* from, int64_t index, int64_t count) {
          routines.quantize(from, center[row], inverse, codes + index, count);
        });
      }
    }
  });
}

// Calls body(from, row, index, count) for stretches of neighbouring rows within [begin, end).
template <typename T, typename Body>
void each_row_stretch(const Rows& layout, const Reader<T>& x, int64_t begin, int64_t end, const Body& body) {
  x.each(begin, end, [&](const T* from, int64_t index, int64_t count) {
    int64_t row = index % layout.rows;
    for (int64_t done = 0; done < count;) {
      const int64_t stretch = std::min(count - done, layout.rows - row);
      body(from + done, row, index + done, stretch);
      done += stretch;
      row = 0;
    }
  });
}

// Rows that are neighbours (inner is one), as the channels of channels_last: each thread takes a share of outer.
template <typename T>
void quantize_neighbours(const Rows& layout, const Reader<T>& x, const std::vector<T>& center, int8_t* codes,
                         float* steps) {
  const auto& routines = elementwise_of<T>();
  const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), layout.outer);
  std::vector<std::vector<T>> largest(shares, std::vector<T>(layout.rows, T(0)));
  parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share) {
      const int64_t begin = layout.outer * share / shares * layout.rows;
      const int64_t end = layout.outer * (share + 1) / shares * layout.rows;
      each_row_stretch(layout, x, begin, end, [&](const T* from, int64_t row, int64_t, int64_t count) {
        routines.deviation_each(from, center.data() + row, largest[share].data() + row, count);
      });
    }
  });
  std::vector<T> inverse(layout.rows);
  for (int64_t row = 0; row < layout.rows; ++row) {
    T most = 0;
    for (const auto& share : largest) {
      most = larger(share[row], most);
    }
    steps[row] = step_of(most);
    inverse[row] = step_inverse<T>(steps[row]);
  }
  parallel_for(0, layout.outer, std::max<int64_t>(1, 32768 / layout.rows), [&](int64_t first, int64_t last) {
    each_row_stretch(layout, x, first * layout.rows, last * layout.rows,
                     [&](const T* from, int64_t row, int64_t index, int64_t count) {
                       routines.quantize_each(from, center.data() + row, inverse.data() + row, codes + index, count);
                     });
  });
}

// Whether memory of `numel` elements is `outer` times `rows` stretches of one length; no product overflows.
bool divides(int64_t outer, int64_t rows, int64_t numel) {
  return outer > 0 && rows > 0 && outer <= numel && rows <= numel && numel % (outer * rows) == 0;
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, std::optional<Tensor> center, int64_t outer, int64_t rows,
                                         Sizes order) {
  check_floating("quantize_rows", "x", x);
  check_order("quantize_rows", x, order);
  check(x.numel() == 0 || divides(outer, rows, x.numel()), "lance::quantize_rows: outer ", outer, " and rows ", rows,
        " do not divide x, of shape ", shape_string(x));
  if (center && (center->dim() != 1 || center->size(0) != rows)) {
    check(false, "lance::quantize_rows: center has shape ", shape_string(*center), "; expected (", rows, ",)");
  }
  const Tensor codes = torch::stable::new_empty(x, {x.numel()}, ScalarType::Char);
  Tensor steps = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  if (x.numel() == 0) {
    return {codes, torch::stable::zero_(steps)};
  }
  const Tensor flat = in_order(x, order);
  const Rows layout{outer, rows, x.numel() / (outer * rows)};
  int8_t* to = static_cast<int8_t*>(codes.mutable_data_ptr());
  float* step = static_cast<float*>(steps.mutable_data_ptr());
  dispatch_accumulation(accumulation_dtype(x.scalar_type()), [&](auto value) {
    using T = decltype(value);
    const std::vector<T> centers = center ? values_of<T>(*center) : std::vector<T>(rows, T(0));
    const auto quantize = layout.inner == 1 && layout.outer > 1 ? quantize_neighbours<T> : quantize_stretches<T>;
    quantize(layout, Reader<T>(flat), centers, to, step);
  });
  return {codes, steps};
}

Tensor dequantize_rows(const Tensor& codes, const Tensor& steps, int64_t outer, const Tensor& like, Sizes order) {
  check_floating("dequantize_rows", "like", like);
  check_order("dequantize_rows", like, order);
  if (codes.scalar_type() != ScalarType::Char || codes.dim() != 1 || codes.size(0) != like.numel()) {
    check(false, "lance::dequantize_rows: codes has dtype ", dtype_name(codes.scalar_type()), " and shape ",
          shape_string(codes), "; expected torch.int8 and ", shape_string(Sizes{like.numel()}), ", one an element of ",
          shape_string(like));
  }
  check_floating("dequantize_rows", "steps", steps);
  check(steps.dim() == 1 && (like.numel() == 0 || divides(outer, steps.size(0), like.numel())),
        "lance::dequantize_rows: steps has shape ", shape_string(steps), "; expected one a row, ", outer,
        " times as many dividing the elements of ", shape_string(like));
  const Tensor result = empty_in_order(like, order);
  if (like.numel() == 0) {
    return from_order(result, order);
  }
  const Rows layout{outer, steps.size(0), like.numel() / (outer * steps.size(0))};
  const Tensor dense = torch::stable::contiguous(codes);
  const int8_t* from = static_cast<const int8_t*>(dense.const_data_ptr());
  dispatch_accumulation(accumulation_dtype(like.scalar_type()), [&](auto value) {
    using T = decltype(value);
    const std::vector<T> step = values_of<T>(steps);
    const auto& routines = elementwise_of<T>();
    // Only the positions count here: nothing is read through the first pointer.
    map_blocks<T>(result.const_data_ptr(), result.mutable_data_ptr(), like.scalar_type(), like.numel(),
                  [&](const T*, T* to, int64_t index, int64_t count) {
                    int64_t row = index / layout.inner % layout.rows;
                    int64_t position = index % layout.inner;
                    for (int64_t done = 0; done < count;) {
                      const bool neighbours = layout.inner == 1;
                      const int64_t room = neighbours ? layout.rows - row : layout.inner - position;
                      const int64_t stretch = std::min(count - done, room);
                      if (neighbours) {
                        routines.dequantize_each(from + index + done, step.data() + row, to + done, stretch);
                        row = 0;
                      } else {
                        routines.dequantize(from + index + done, step[row], to + done, stretch);
                        row = row + 1 == layout.rows ? 0 : row + 1;
                      }
                      position = 0;
                      done += stretch;
                    }
                  });
  });
  return from_order(result, order);
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&lance::quantize_rows));
  m.impl("dequantize_rows", TORCH_BOX(&lance::dequantize_rows));
}
