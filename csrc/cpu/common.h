// What every CPU operator file needs: argument checks with the words of lance_kernels/ops/_checks.py, dispatch over
// the floating dtypes, and parallel_for.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace lance {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// One (size, rank) matrix or nothing a mode.
using Factors = std::vector<std::optional<Tensor>>;
using Sizes = std::vector<int64_t>;

// Messages are strings that are appended to, not streams: where a library brings a C++ runtime of its own into the
// process, a stream may take facets of its locale from the other and crash.
inline void append(std::string& message, std::string_view part) {
  message += part;
}

template <std::integral Number>
  requires(!std::same_as<Number, char>)
void append(std::string& message, Number part) {
  message += std::to_string(part);
}

template <std::floating_point Number>
void append(std::string& message, Number part) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(part));
  message += digits;
}

// Raises RuntimeError in Python; `parts` are put together only when `condition` fails.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]] {
    return;
  }
  std::string message;
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return std::string("torch.") + torch::headeronly::toString(dtype);
  }
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline Sizes strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return Sizes(strides.begin(), strides.end());
}

inline std::string joined(const Sizes& values) {
  std::string out;
  for (size_t index = 0; index < values.size(); ++index) {
    append(out, index ? ", " : "");
    append(out, values[index]);
  }
  return out;
}

// As Python prints a tuple: (2, 3), (2,), ().
inline std::string shape_string(const Sizes& sizes) {
  return "(" + joined(sizes) + (sizes.size() == 1 ? ",)" : ")");
}

// As Python prints a list: [2, 3].
inline std::string list_string(const Sizes& values) {
  return "[" + joined(values) + "]";
}

inline std::string shape_string(const Tensor& tensor) {
  return shape_string(sizes_of(tensor));
}

// What strides, paddings and dilations may be, so that no sum or product of one with a size overflows.
constexpr int64_t most_number = (int64_t{1} << 31) - 1;

inline bool all_within(const Sizes& values, int64_t least) {
  return std::all_of(values.begin(), values.end(),
                     [least](int64_t value) { return least <= value && value <= most_number; });
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void check_floating(const char* operation, const std::string& argument, const Tensor& tensor) {
  if (!is_floating(tensor.scalar_type())) {
    check(false, "lance::", operation, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          "; expected float32, float64, bfloat16 or float16");
  }
}

// Float64 for float64, float32 for the rest.
inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Type in which sums over values of type T are kept.
template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using accumulation_t = typename Accumulation<T>::type;

// Calls `body` with a value of the C++ type of `dtype`, one of the four floating ones.
template <typename Body>
decltype(auto) dispatch_floating(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      return body(float{});
  }
}

// The same over the two types sums are kept in.
template <typename Body>
decltype(auto) dispatch_accumulation(ScalarType dtype, const Body& body) {
  return dtype == ScalarType::Double ? body(double{}) : body(float{});
}

// Refuses to add to a tensor of which several entries lie in one place.
inline void check_not_expanded(const char* operation, const std::string& argument, const Tensor& tensor) {
  for (int64_t mode = 0; mode < tensor.dim(); ++mode) {
    check(tensor.size(mode) < 2 || tensor.stride(mode) != 0, "lance::", operation, ": ", argument, " has strides ",
          list_string(strides_of(tensor)), "; expected a place for each entry, none expanded");
  }
}

// Refuses factors that do not fit `tensor`; side 0 compares its modes with the factors' sizes, side 1 with their ranks.
void check_factors(const char* operation, const char* argument, const Tensor& tensor, const Factors& factors,
                   int64_t side);

// Refuses a tensor whose dtype or device is not that of the operator's first argument.
void check_same(const char* operation, const Tensor& first, const char* argument, const Tensor& tensor);

}  // namespace lance
