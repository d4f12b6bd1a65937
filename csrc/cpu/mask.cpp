#include <cstring>
#include <tuple>

#include "blocks.h"

namespace lance {
namespace {

void check_bounds(std::optional<double> low, std::optional<double> high) {
  check(!low || !high || *low <= *high, "lance::masked_activation: low is ", low.value_or(0), " and high ",
        high.value_or(0), "; expected low to be at most high");
}

template <typename T>
Piecewise<T> piecewise(std::optional<double> low, std::optional<double> high, std::optional<double> slope) {
  if (slope) {
    return {Piecewise<T>::leaky, 0, 0, static_cast<T>(*slope)};
  }
  if (low && high) {
    return {Piecewise<T>::clamp, static_cast<T>(*low), static_cast<T>(*high), 0};
  }
  return {Piecewise<T>::relu};
}

// Writes the activation of `flat` to `result`, which may be `flat`, and the bits to `mask`.
void activate(const Tensor& flat, void* result, const Tensor& mask, std::optional<double> low,
              std::optional<double> high, std::optional<double> slope) {
  uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const ScalarType dtype = flat.scalar_type();
  dispatch_accumulation(accumulation_dtype(dtype), [&](auto value) {
    using T = decltype(value);
    const Piecewise<T> function = piecewise<T>(low, high, slope);
    const auto& routines = elementwise_of<T>();
    map_blocks<T>(flat.const_data_ptr(), result, dtype, flat.numel(),
                  [&](const T* from, T* to, int64_t index, int64_t count) {
                    routines.activate(function, from, to, bits + index / 8, count);
                  });
  });
}

std::tuple<Tensor, Tensor> masked_activation(const Tensor& x, std::optional<double> low, std::optional<double> high,
                                             std::optional<double> slope, Sizes order) {
  check_floating("masked_activation", "x", x);
  check_bounds(low, high);
  check_order("masked_activation", x, order);
  const Tensor flat = in_order(x, order);
  const Tensor y = empty_in_order(x, order);
  const Tensor mask = torch::stable::new_empty(x, {mask_bytes(x)}, ScalarType::Byte);
  activate(flat, y.mutable_data_ptr(), mask, low, high, slope);
  return {from_order(y, order), mask};
}

Tensor masked_activation_in_place(Tensor x, std::optional<double> low, std::optional<double> high,
                                  std::optional<double> slope, Sizes order) {
  check_floating("masked_activation", "x", x);
  check_bounds(low, high);
  check_order("masked_activation", x, order);
  const Tensor flat = in_order(x, order);
  const Tensor mask = torch::stable::new_empty(x, {mask_bytes(x)}, ScalarType::Byte);
  activate(flat, flat.mutable_data_ptr(), mask, low, high, slope);
  if (flat.const_data_ptr() != x.const_data_ptr()) {
    torch::stable::copy_(x, from_order(flat, order));
  }
  return mask;
}

Tensor masked_activation_grad(const Tensor& grad, const Tensor& mask, std::optional<double> slope, Sizes order) {
  check_floating("masked_activation_grad", "grad", grad);
  check_order("masked_activation_grad", grad, order);
  check_mask("masked_activation_grad", mask, grad);
  const Tensor flat = in_order(grad, order);
  const Tensor result = empty_in_order(grad, order);
  const Tensor dense = torch::stable::contiguous(mask);
  const uint8_t* bits = static_cast<const uint8_t*>(dense.const_data_ptr());
  dispatch_accumulation(accumulation_dtype(grad.scalar_type()), [&](auto value) {
    using T = decltype(value);
    const auto& routines = elementwise_of<T>();
    map_blocks<T>(flat.const_data_ptr(), result.mutable_data_ptr(), grad.scalar_type(), grad.numel(),
                  [&](const T* from, T* to, int64_t index, int64_t count) {
                    routines.select(from, bits + index / 8, slope.has_value(), static_cast<T>(slope.value_or(0)), to,
                                    count);
                  });
  });
  return from_order(result, order);
}

Tensor pack_mask(const Tensor& bits, Sizes order) {
  check_order("pack_mask", bits, order);
  check(bits.scalar_type() == ScalarType::Bool, "lance::pack_mask: bits has dtype ", dtype_name(bits.scalar_type()),
        "; expected torch.bool");
  const Tensor flat = in_order(bits, order);
  const Tensor mask = torch::stable::new_empty(bits, {mask_bytes(bits)}, ScalarType::Byte);
  const uint8_t* from = static_cast<const uint8_t*>(flat.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t total = bits.numel();
  parallel_for(0, mask.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t byte = begin; byte < end; ++byte) {
      unsigned packed = 0;
      const int64_t count = std::min<int64_t>(8, total - byte * 8);
      for (int64_t lane = 0; lane < count; ++lane) {
        packed |= static_cast<unsigned>(from[byte * 8 + lane] != 0) << lane;
      }
      to[byte] = static_cast<uint8_t>(packed);
    }
  });
  return mask;
}

Tensor unpack_mask(const Tensor& mask, const Tensor& like, Sizes order) {
  check_order("unpack_mask", like, order);
  check_mask("unpack_mask", mask, like);
  Sizes sizes;
  for (const int64_t dimension : order) {
    sizes.push_back(like.size(dimension));
  }
  const Tensor bits = torch::stable::new_empty(like, sizes, ScalarType::Bool);
  const Tensor dense = torch::stable::contiguous(mask);
  const uint8_t* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  parallel_for(0, like.numel(), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      to[index] = from[index / 8] >> index % 8 & 1;
    }
  });
  return from_order(bits, order);
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("masked_activation", TORCH_BOX(&lance::masked_activation));
  m.impl("masked_activation_", TORCH_BOX(&lance::masked_activation_in_place));
  m.impl("masked_activation_grad", TORCH_BOX(&lance::masked_activation_grad));
  m.impl("pack_mask", TORCH_BOX(&lance::pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&lance::unpack_mask));
}
