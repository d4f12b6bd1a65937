#include "geometry.h"

namespace lance {

Sizes check_geometry(const char* operation, const Sizes& input_size, const Sizes& weight_size,
                     const Geometry& geometry) {
  const int64_t dimensions = static_cast<int64_t>(input_size.size()) - 2;
  check(1 <= dimensions && dimensions <= 3 && weight_size.size() == input_size.size(), "lance::", operation,
        ": weight has size ", shape_string(weight_size), " and the input ", shape_string(input_size),
        "; expected (O, C / groups, *kernel) and (B, C, *spatial) with one to three spatial modes");
  const size_t count = static_cast<size_t>(dimensions);
  for (const auto& [argument, values] :
       {std::pair("stride", &geometry.stride), std::pair("dilation", &geometry.dilation)}) {
    check(values->size() == count && all_within(*values, 1), "lance::", operation, ": ", argument, " is ",
          list_string(*values), "; expected ", dimensions, " numbers from 1 to ", most_number);
  }
  const Sizes& padding = geometry.padding;
  check((padding.size() == count || padding.size() == 2 * count) && all_within(padding, 0), "lance::", operation,
        ": padding is ", list_string(padding), "; expected ", dimensions, " or ", 2 * dimensions, " numbers from 0 to ",
        most_number);
  const std::string& padding_mode = geometry.padding_mode;
  check(
      padding_mode == "zeros" || padding_mode == "reflect" || padding_mode == "replicate" || padding_mode == "circular",
      "lance::", operation, ": padding_mode is '", padding_mode,
      "'; expected one of zeros, reflect, replicate, circular");
  check(geometry.groups >= 1 && weight_size[0] % geometry.groups == 0 &&
            input_size[1] == weight_size[1] * geometry.groups,
        "lance::", operation, ": weight has size ", shape_string(weight_size), ", the input ", shape_string(input_size),
        " and groups is ", geometry.groups,
        "; expected C = weight's second size times groups, and O a multiple of groups");
  Sizes output{input_size[0], weight_size[0]};
  for (size_t mode = 0; mode < count; ++mode) {
    const int64_t size = input_size[2 + mode];
    const int64_t taps = weight_size[2 + mode];
    const auto [before, after] = geometry.pads(mode);
    const int64_t limit = padding_mode == "reflect" ? size - 1 : size;
    check(padding_mode == "zeros" || padding_mode == "replicate" || std::max(before, after) <= limit,
          "lance::", operation, ": padding ", list_string(padding), " is too large for ", padding_mode,
          " padding of an input of size ", shape_string(input_size));
    const int64_t padded = size + before + after;
    check(taps >= 1 && padded >= 1 && taps - 1 <= (padded - 1) / geometry.dilation[mode], "lance::", operation,
          ": weight has size ", shape_string(weight_size), ", larger than the padded input of size ",
          shape_string(input_size), " with padding ", list_string(padding), " and dilation ",
          list_string(geometry.dilation));
    output.push_back((padded - 1 - geometry.dilation[mode] * (taps - 1)) / geometry.stride[mode] + 1);
  }
  return output;
}

int64_t padded_row(int64_t index, int64_t size, const std::string& padding_mode) {
  if (0 <= index && index < size) {
    return index;
  }
  if (padding_mode == "zeros") {
    return -1;
  }
  if (padding_mode == "replicate") {
    return index < 0 ? 0 : size - 1;
  }
  if (padding_mode == "circular") {
    return (index % size + size) % size;
  }
  return index < 0 ? -index : 2 * (size - 1) - index;
}

template <typename T>
Matrix<T> shifted(const std::optional<Tensor>& factor, int64_t size, int64_t outputs, int64_t taps,
                  const Geometry& geometry, size_t mode) {
  const Matrix<T> straight = factor ? projecting<T>(*factor) : Matrix<T>{};
  const int64_t rank = factor ? straight.outputs : size;
  const int64_t before = geometry.pads(mode).first;
  Matrix<T> matrix{outputs, taps * rank, Buffer<T>(outputs * taps * rank)};
  T* to = matrix.data.data();
  for (int64_t output = 0; output < outputs; ++output) {
    for (int64_t tap = 0; tap < taps; ++tap, to += rank) {
      const int64_t index = geometry.stride[mode] * output + geometry.dilation[mode] * tap - before;
      const int64_t row = padded_row(index, size, geometry.padding_mode);
      std::fill_n(to, rank, T(0));
      if (row >= 0 && factor) {
        std::copy_n(straight.data.data() + row * rank, rank, to);
      } else if (row >= 0) {
        to[row] = T(1);
      }
    }
  }
  return matrix;
}

template <typename T>
Matrix<T> expanding_padded(const std::optional<Tensor>& factor, int64_t size, const Geometry& geometry, size_t mode) {
  const auto [before, after] = geometry.pads(mode);
  // The rows are those a kernel of one tap meets at every position of the padded mode.
  Geometry every = geometry;
  every.stride[mode] = 1;
  const Matrix<T> rows = shifted<T>(factor, size, before + size + after, 1, every, mode);
  Matrix<T> matrix{rows.outputs, rows.inputs, Buffer<T>(rows.inputs * rows.outputs)};
  for (int64_t row = 0; row < rows.inputs; ++row) {
    for (int64_t column = 0; column < rows.outputs; ++column) {
      matrix.data.data()[column * rows.inputs + row] = rows.data.data()[row * rows.outputs + column];
    }
  }
  return matrix;
}

template Matrix<float> shifted<float>(const std::optional<Tensor>&, int64_t, int64_t, int64_t, const Geometry&, size_t);
template Matrix<double> shifted<double>(const std::optional<Tensor>&, int64_t, int64_t, int64_t, const Geometry&,
                                        size_t);
template Matrix<float> expanding_padded<float>(const std::optional<Tensor>&, int64_t, const Geometry&, size_t);
template Matrix<double> expanding_padded<double>(const std::optional<Tensor>&, int64_t, const Geometry&, size_t);

}  // namespace lance
