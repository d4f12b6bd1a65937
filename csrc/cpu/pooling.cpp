#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "blocks.h"

namespace lance {
namespace {

// A pooling over three spatial dimensions; two-dimensional ones have a first of size one.
struct Window {
  int64_t size[3];
  int64_t out[3];
  int64_t kernel[3];
  int64_t stride[3];
  int64_t padding[3];
  int64_t dilation[3];
  bool channels_last;
  int64_t batch;
  int64_t channels;

  int64_t inputs() const {
    return size[0] * size[1] * size[2];
  }
  int64_t outputs() const {
    return out[0] * out[1] * out[2];
  }
};

// The rule of lance_kernels/ops/pooling.py: pooled_size.
int64_t pooled_size(int64_t length, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t span = length + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  const int64_t floor = span >= 0 ? span / stride : -((-span + stride - 1) / stride);
  const int64_t count = floor + 1;
  return ceil_mode && (count - 1) * stride >= length + padding ? count - 1 : count;
}

void check_window(const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                  const Sizes& dilation) {
  const int64_t spatial = static_cast<int64_t>(kernel.size());
  check_floating("max_pool", "x", x);
  check((spatial == 2 || spatial == 3) && (x.dim() == spatial + 1 || x.dim() == spatial + 2),
        "lance::max_pool: x has shape ", shape_string(x), " and the window ", list_string(kernel),
        "; expected two or three spatial dimensions after (B, C) or (C)");
  bool fits = stride.size() == kernel.size() && padding.size() == kernel.size() && dilation.size() == kernel.size();
  int64_t elements = 1;
  for (size_t index = 0; fits && index < kernel.size(); ++index) {
    fits = all_within({stride[index], dilation[index], kernel[index]}, 1);
    // Once too large it is left as it is: a further product could overflow.
    elements = elements > 256 ? elements : elements * kernel[index];
  }
  check(fits, "lance::max_pool: stride ", list_string(stride), ", padding ", list_string(padding), " and dilation ",
        list_string(dilation), " do not fit the window ", list_string(kernel), "; expected one number from 1 to ",
        most_number, " a spatial dimension");
  check(elements <= 256, "lance::max_pool: the window ", list_string(kernel),
        " has too many elements; expected at most 256, one byte");
  for (size_t index = 0; index < kernel.size(); ++index) {
    check(padding[index] >= 0 && padding[index] <= kernel[index] / 2, "lance::max_pool: padding is ",
          list_string(padding), "; expected at most half the window ", list_string(kernel));
  }
}

// The order of the dimensions of a channels_last image batch, or an empty one.
Sizes channels_last_order(const Tensor& x, size_t spatial) {
  // A volume without a batch has as many dimensions as a batch of images.
  if (x.dim() != static_cast<int64_t>(spatial) + 2 || x.is_contiguous()) {
    return {};
  }
  Sizes order{0};
  for (int64_t dimension = 2; dimension < x.dim(); ++dimension) {
    order.push_back(dimension);
  }
  order.push_back(1);
  int64_t stride = 1;
  for (size_t position = order.size(); position-- > 0;) {
    const int64_t size = x.size(order[position]);
    if (size != 1 && x.stride(order[position]) != stride) {
      return {};
    }
    stride *= size;
  }
  return order;
}

Window make_window(const Sizes& shape, const Sizes& size, const Sizes& out, const Sizes& kernel, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, bool channels_last) {
  Window window{{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, channels_last, 1, 1};
  const size_t spatial = kernel.size();
  for (size_t index = 0; index < spatial; ++index) {
    const size_t place = 3 - spatial + index;
    window.size[place] = size[index];
    window.out[place] = out[index];
    window.kernel[place] = kernel[index];
    window.stride[place] = stride[index];
    window.padding[place] = padding[index];
    window.dilation[place] = dilation[index];
  }
  window.channels = shape[shape.size() - spatial - 1];
  window.batch = shape.size() == spatial + 2 ? shape[0] : 1;
  return window;
}

// The kernel positions of one output coordinate that lie inside the input.
struct Reach {
  int64_t begin;
  int64_t end;
  int64_t start;
};

Reach reach(const Window& window, int dim, int64_t output) {
  const int64_t start = output * window.stride[dim] - window.padding[dim];
  const int64_t gap = window.dilation[dim];
  const int64_t begin = start < 0 ? (-start + gap - 1) / gap : 0;
  const int64_t room = window.size[dim] - start;
  const int64_t end = std::min(window.kernel[dim], room > 0 ? (room + gap - 1) / gap : 0);
  return {begin, end, start};
}

// Calls body(input, offset, first) for each input position of one output's window.
template <typename Body>
inline void each_position(const Window& window, const Reach& depth, const Reach& row, const Reach& column,
                          const Body& body) {
  bool first = true;
  for (int64_t d = depth.begin; d < depth.end; ++d) {
    const int64_t at_depth = (depth.start + d * window.dilation[0]) * window.size[1];
    for (int64_t r = row.begin; r < row.end; ++r) {
      const int64_t at_row = (at_depth + row.start + r * window.dilation[1]) * window.size[2];
      const int64_t offset = (d * window.kernel[1] + r) * window.kernel[2];
      for (int64_t c = column.begin; c < column.end; ++c) {
        body(at_row + column.start + c * window.dilation[2], offset + c, first);
        first = false;
      }
    }
  }
}

std::vector<Reach> reaches(const Window& window, int dim) {
  std::vector<Reach> all;
  for (int64_t output = 0; output < window.out[dim]; ++output) {
    all.push_back(reach(window, dim, output));
  }
  return all;
}

// Calls body(output, depth, row, column) for each output position.
template <typename Body>
inline void each_output(const Window& window, const Body& body) {
  const std::vector<Reach> rows = reaches(window, 1);
  const std::vector<Reach> columns = reaches(window, 2);
  int64_t output = 0;
  for (const Reach& depth : reaches(window, 0)) {
    for (const Reach& row : rows) {
      for (const Reach& column : columns) {
        body(output++, depth, row, column);
      }
    }
  }
}

template <typename T>
bool beats(T value, T best) {
  return value > best || value != value;
}

template <typename T>
void pool_planes(const Window& window, const T* x, T* y, uint8_t* offsets) {
  parallel_for(0, window.batch * window.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* from = x + plane * window.inputs();
      T* to = y + plane * window.outputs();
      uint8_t* at = offsets + plane * window.outputs();
      each_output(window, [&](int64_t output, const Reach& depth, const Reach& row, const Reach& column) {
        T best = -std::numeric_limits<T>::infinity();
        int64_t chosen = 0;
        each_position(window, depth, row, column, [&](int64_t input, int64_t offset, bool first) {
          const T value = from[input];
          if (first) {
            chosen = offset;
          }
          if (beats(value, best)) {
            best = value;
            chosen = offset;
          }
        });
        to[output] = best;
        at[output] = static_cast<uint8_t>(chosen);
      });
    }
  });
}

// One output row at a time: for each kernel position the outputs that reach it, which are neighbours.
template <typename T>
void pool_rows(const Window& window, const T* x, T* y, uint8_t* offsets) {
  const auto& routines = elementwise_of<T>();
  const std::vector<Reach> depths = reaches(window, 0);
  const std::vector<Reach> rows = reaches(window, 1);
  const std::vector<Reach> columns = reaches(window, 2);
  const int64_t width = window.out[2];
  std::vector<int64_t> first(window.kernel[2], width);
  std::vector<int64_t> last(window.kernel[2], 0);
  for (int64_t output = 0; output < width; ++output) {
    for (int64_t c = columns[output].begin; c < columns[output].end; ++c) {
      first[c] = std::min(first[c], output);
      last[c] = output + 1;
    }
  }
  parallel_for(0, window.batch * window.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* from = x + plane * window.inputs();
      T* to = y + plane * window.outputs();
      uint8_t* at = offsets + plane * window.outputs();
      for (const Reach& depth : depths) {
        for (const Reach& row : rows) {
          std::fill_n(to, width, -std::numeric_limits<T>::infinity());
          const int64_t before = (depth.begin * window.kernel[1] + row.begin) * window.kernel[2];
          for (int64_t output = 0; output < width; ++output) {
            at[output] = static_cast<uint8_t>(before + columns[output].begin);
          }
          for (int64_t d = depth.begin; d < depth.end; ++d) {
            const int64_t at_depth = (depth.start + d * window.dilation[0]) * window.size[1];
            for (int64_t r = row.begin; r < row.end; ++r) {
              const T* line = from + (at_depth + row.start + r * window.dilation[1]) * window.size[2];
              const int64_t offset = (d * window.kernel[1] + r) * window.kernel[2];
              for (int64_t c = 0; c < window.kernel[2]; ++c) {
                if (first[c] < last[c]) {
                  const int64_t input = columns[first[c]].start + c * window.dilation[2];
                  routines.keep_larger(line + input, window.stride[2], static_cast<uint8_t>(offset + c), to + first[c],
                                       at + first[c], last[c] - first[c]);
                }
              }
            }
          }
          to += width;
          at += width;
        }
      }
    }
  });
}

template <typename T>
void pool_channels(const Window& window, const T* x, T* y, uint8_t* offsets) {
  const int64_t channels = window.channels;
  parallel_for(0, window.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const T* from = x + image * window.inputs() * channels;
      each_output(window, [&](int64_t output, const Reach& depth, const Reach& row, const Reach& column) {
        T* to = y + (image * window.outputs() + output) * channels;
        uint8_t* at = offsets + (image * window.outputs() + output) * channels;
        std::fill_n(to, channels, -std::numeric_limits<T>::infinity());
        each_position(window, depth, row, column, [&](int64_t input, int64_t offset, bool first) {
          const T* values = from + input * channels;
          if (first) {
            std::fill_n(at, channels, static_cast<uint8_t>(offset));
          }
          if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
            elementwise_of<T>().keep_larger(values, 1, static_cast<uint8_t>(offset), to, at, channels);
          } else {
            for (int64_t channel = 0; channel < channels; ++channel) {
              const bool better = beats(values[channel], to[channel]);
              to[channel] = better ? values[channel] : to[channel];
              at[channel] = better ? static_cast<uint8_t>(offset) : at[channel];
            }
          }
        });
      });
    }
  });
}

// Input positions by window offset, relative to where the window starts. An offset that is not the pooling's own may
// stand for any byte: those beyond the window's come to lie outside of every input.
std::array<int64_t, 256> window_positions(const Window& window) {
  std::array<int64_t, 256> positions;
  positions.fill(std::numeric_limits<int64_t>::min() / 2);
  int64_t offset = 0;
  for (int64_t d = 0; d < window.kernel[0]; ++d) {
    for (int64_t r = 0; r < window.kernel[1]; ++r) {
      for (int64_t c = 0; c < window.kernel[2]; ++c) {
        const int64_t row = d * window.dilation[0] * window.size[1] + r * window.dilation[1];
        positions[offset++] = row * window.size[2] + c * window.dilation[2];
      }
    }
  }
  return positions;
}

// Outside of every input, whatever the offset.
constexpr int64_t nowhere = std::numeric_limits<int64_t>::min() / 4;

// Where the window of each output starts; `nowhere` for a dilated one that steps over the whole input.
std::vector<int64_t> window_starts(const Window& window) {
  std::vector<int64_t> starts;
  each_output(window, [&](int64_t, const Reach& depth, const Reach& row, const Reach& column) {
    const bool empty = depth.begin >= depth.end || row.begin >= row.end || column.begin >= column.end;
    const int64_t start = (depth.start * window.size[1] + row.start) * window.size[2] + column.start;
    starts.push_back(empty ? nowhere : start);
  });
  return starts;
}

// Sums of 16-bit dtypes are rounded at each step where ATen rounds them. Returns whether all offsets were inside.
template <typename T>
bool grad_planes(const Window& window, const T* grad, const uint8_t* offsets, T* grad_x) {
  const std::array<int64_t, 256> positions = window_positions(window);
  const std::vector<int64_t> starts = window_starts(window);
  const int64_t outputs = window.outputs();
  const int64_t inputs = window.inputs();
  std::atomic<bool> right{true};
  parallel_for(0, window.batch * window.channels, 1, [&](int64_t begin, int64_t end) {
    bool inside = true;
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* from = grad + plane * outputs;
      const uint8_t* at = offsets + plane * outputs;
      T* to = grad_x + plane * inputs;
      std::fill_n(to, inputs, T(0));
      for (int64_t output = 0; output < outputs; ++output) {
        const int64_t position = starts[output] + positions[at[output]];
        if (static_cast<uint64_t>(position) < static_cast<uint64_t>(inputs)) {
          to[position] = static_cast<T>(to[position] + from[output]);
        } else if (starts[output] != nowhere) {
          inside = false;
        }
      }
    }
    if (!inside) {
      right = false;
    }
  });
  return right;
}

template <typename T>
bool grad_channels(const Window& window, const T* grad, const uint8_t* offsets, T* grad_x) {
  const std::array<int64_t, 256> positions = window_positions(window);
  const std::vector<int64_t> starts = window_starts(window);
  const int64_t outputs = window.outputs();
  const int64_t inputs = window.inputs();
  const int64_t channels = window.channels;
  std::atomic<bool> right{true};
  parallel_for(0, window.batch, 1, [&](int64_t begin, int64_t end) {
    bool inside = true;
    for (int64_t image = begin; image < end; ++image) {
      const T* from = grad + image * outputs * channels;
      const uint8_t* at = offsets + image * outputs * channels;
      T* to = grad_x + image * inputs * channels;
      std::fill_n(to, inputs * channels, T(0));
      for (int64_t output = 0; output < outputs; ++output, from += channels, at += channels) {
        for (int64_t channel = 0; channel < channels; ++channel) {
          const int64_t position = starts[output] + positions[at[channel]];
          if (static_cast<uint64_t>(position) < static_cast<uint64_t>(inputs)) {
            T& sum = to[position * channels + channel];
            sum = static_cast<T>(sum + from[channel]);
          } else if (starts[output] != nowhere) {
            inside = false;
          }
        }
      }
    }
    if (!inside) {
      right = false;
    }
  });
  return right;
}

Tensor empty_image(const Tensor& like, const Sizes& shape, const Sizes& order, std::optional<ScalarType> dtype) {
  if (order.empty()) {
    return torch::stable::new_empty(like, shape, dtype);
  }
  Sizes permuted;
  for (const int64_t dimension : order) {
    permuted.push_back(shape[dimension]);
  }
  return from_order(torch::stable::new_empty(like, permuted, dtype), order);
}

std::tuple<Tensor, Tensor> max_pool_offsets(const Tensor& x, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                                            bool ceil_mode) {
  check_window(x, kernel, stride, padding, dilation);
  const Sizes order = channels_last_order(x, kernel.size());
  const Tensor dense = order.empty() ? torch::stable::contiguous(x) : x;
  const size_t spatial = kernel.size();
  Sizes shape = sizes_of(x);
  const Sizes size(shape.end() - spatial, shape.end());
  Sizes out;
  for (size_t index = 0; index < spatial; ++index) {
    out.push_back(pooled_size(size[index], kernel[index], stride[index], padding[index], dilation[index], ceil_mode));
    check(out.back() > 0, "lance::max_pool: x has shape ", shape_string(x), ", too small for the window ",
          list_string(kernel));
    shape[shape.size() - spatial + index] = out.back();
  }
  const Tensor y = empty_image(x, shape, order, std::nullopt);
  const Tensor offsets = empty_image(x, shape, order, ScalarType::Byte);
  const Window window = make_window(shape, size, out, kernel, stride, padding, dilation, !order.empty());
  dispatch_floating(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    auto pool = window.channels_last ? pool_channels<T> : pool_planes<T>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      pool = window.channels_last ? pool_channels<T> : pool_rows<T>;
    }
    pool(window, static_cast<const T*>(dense.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
         static_cast<uint8_t*>(offsets.mutable_data_ptr()));
  });
  return {y, offsets};
}

Tensor max_pool_grad(const Tensor& grad, const Tensor& offsets, Sizes size, Sizes kernel, Sizes stride, Sizes padding,
                     Sizes dilation, bool ceil_mode) {
  check_window(grad, kernel, stride, padding, dilation);
  check(sizes_of(grad) == sizes_of(offsets) && offsets.scalar_type() == ScalarType::Byte,
        "lance::max_pool_grad: grad has shape ", shape_string(grad), ", offsets ", shape_string(offsets), " and dtype ",
        dtype_name(offsets.scalar_type()), "; expected the same shape, and torch.uint8");
  const Sizes order = channels_last_order(offsets, kernel.size());
  const size_t spatial = kernel.size();
  Sizes shape = sizes_of(grad);
  const Sizes out(shape.end() - spatial, shape.end());
  bool pools = size.size() == spatial;
  for (size_t index = 0; pools && index < spatial; ++index) {
    pools = size[index] > 0 && out[index] == pooled_size(size[index], kernel[index], stride[index], padding[index],
                                                         dilation[index], ceil_mode);
  }
  check(pools, "lance::max_pool_grad: size is ", list_string(size), ", which does not pool to ", list_string(out),
        ", as grad is");
  std::copy(size.begin(), size.end(), shape.end() - spatial);
  const Tensor grad_x = empty_image(grad, shape, order, std::nullopt);
  const Tensor dense_offsets = order.empty() ? torch::stable::contiguous(offsets) : offsets;
  const Tensor dense = order.empty() ? torch::stable::contiguous(grad) : in_order(grad, order);
  const Window window = make_window(shape, size, out, kernel, stride, padding, dilation, !order.empty());
  dispatch_floating(grad.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const auto add = window.channels_last ? grad_channels<T> : grad_planes<T>;
    check(add(window, static_cast<const T*>(dense.const_data_ptr()),
              static_cast<const uint8_t*>(dense_offsets.const_data_ptr()), static_cast<T*>(grad_x.mutable_data_ptr())),
          "lance::max_pool_grad: offsets hold a position outside of the input; expected those of max_pool_offsets");
  });
  return grad_x;
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("max_pool_offsets", TORCH_BOX(&lance::max_pool_offsets));
  m.impl("max_pool_grad", TORCH_BOX(&lance::max_pool_grad));
}
