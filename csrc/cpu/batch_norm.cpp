#include <cmath>
#include <tuple>

#include "blocks.h"

namespace lance {
namespace {

using Vector = std::optional<Tensor>;

void check_batch_norm(const char* operation, const Tensor& x, const Vector& weight, const Vector& bias,
                      const Vector& mean, const Vector& var) {
  check_floating(operation, "x", x);
  check(x.dim() >= 2, "lance::", operation, ": x has shape ", shape_string(x), "; expected (B, C, ...)");
  const std::pair<const char*, const Vector*> vectors[] = {
      {"weight", &weight}, {"bias", &bias}, {"mean", &mean}, {"var", &var}};
  for (const auto& [name, vector] : vectors) {
    if (*vector) {
      check_floating(operation, name, **vector);
    }
    if (*vector && ((*vector)->dim() != 1 || (*vector)->size(0) != x.size(1))) {
      check(false, "lance::", operation, ": ", name, " has shape ", shape_string(**vector), "; expected (", x.size(1),
            ",), the channels of x, whose shape is ", shape_string(x));
    }
  }
}

// Memory as (outer, channels, inner).
struct Channels {
  int64_t channels;
  int64_t inner;
};

Channels channels_in(const Tensor& x, const Sizes& order) {
  int64_t inner = 1;
  for (size_t position = order.size(); order[--position] != 1;) {
    inner *= x.size(order[position]);
  }
  return {x.size(1), inner};
}

// 1 / sqrt(var + eps), in the precision of each step of ATen's backward.
template <typename T>
std::vector<T> inverse_deviation(const Tensor& var, double eps) {
  std::vector<T> inverse = values_of<T>(var);
  for (T& value : inverse) {
    value = static_cast<T>(1 / std::sqrt(static_cast<double>(value) + eps));
  }
  return inverse;
}

// Runs one routine over the stretches of [index, index + count) that share a channel, or, where the channels are
// neighbours, its `each` form over stretches of channels.
template <typename T, typename One, typename Each>
void by_channel(const Channels& layout, const T* from, const std::vector<T>& first, const std::vector<T>& second, T* to,
                int64_t index, int64_t count, const One& one, const Each& each) {
  int64_t channel = index / layout.inner % layout.channels;
  if (layout.inner == 1) {
    while (count > 0) {
      const int64_t stretch = std::min(count, layout.channels - channel);
      each(from, first.data() + channel, second.data() + channel, to, stretch);
      from += stretch;
      to += stretch;
      count -= stretch;
      channel = 0;
    }
    return;
  }
  int64_t position = index % layout.inner;
  while (count > 0) {
    const int64_t stretch = std::min(count, layout.inner - position);
    one(from, first[channel], second[channel], to, stretch);
    from += stretch;
    to += stretch;
    count -= stretch;
    position = 0;
    channel = channel + 1 == layout.channels ? 0 : channel + 1;
  }
}

std::tuple<Tensor, Tensor> batch_norm_relu_mask(const Tensor& x, Vector weight, Vector bias, const Tensor& mean,
                                                const Tensor& var, double eps, std::optional<double> high,
                                                Sizes order) {
  check_batch_norm("batch_norm_relu_mask", x, weight, bias, mean, var);
  check(eps > 0, "lance::batch_norm_relu_mask: eps is ", eps, "; expected a positive number");
  check(!high || *high >= 0, "lance::batch_norm_relu_mask: high is ", high.value_or(0), "; expected at least 0");
  check_order("batch_norm_relu_mask", x, order);
  const Tensor flat = in_order(x, order);
  const Tensor y = empty_in_order(x, order);
  const Tensor mask = torch::stable::new_empty(x, {mask_bytes(x)}, ScalarType::Byte);
  const Channels layout = channels_in(x, order);
  uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  dispatch_accumulation(accumulation_dtype(x.scalar_type()), [&](auto value) {
    using T = decltype(value);
    // Rounded as ATen's forward rounds, which its backward does not.
    std::vector<T> scale = values_of<T>(var);
    for (T& spread : scale) {
      spread = T(1) / std::sqrt(spread + static_cast<T>(eps));
    }
    std::vector<T> shift = bias ? values_of<T>(*bias) : std::vector<T>(scale.size(), T(0));
    const std::vector<T> means = values_of<T>(mean);
    const std::vector<T> weights = weight ? values_of<T>(*weight) : std::vector<T>(scale.size(), T(1));
    for (size_t channel = 0; channel < scale.size(); ++channel) {
      scale[channel] *= weights[channel];
      shift[channel] = std::fma(-means[channel], scale[channel], shift[channel]);
    }
    const auto& routines = elementwise_of<T>();
    const Piecewise<T> function =
        high ? Piecewise<T>{Piecewise<T>::clamp, 0, static_cast<T>(*high), 0} : Piecewise<T>{Piecewise<T>::relu};
    map_blocks<T>(flat.const_data_ptr(), y.mutable_data_ptr(), x.scalar_type(), x.numel(),
                  [&](const T* from, T* to, int64_t index, int64_t count) {
                    for (int64_t done = 0; done < count; done += block_size) {
                      const int64_t part = std::min(block_size, count - done);
                      by_channel(layout, from + done, scale, shift, to + done, index + done, part, routines.affine,
                                 routines.affine_each);
                      routines.activate(function, to + done, to + done, bits + (index + done) / 8, part);
                    }
                  });
  });
  return {from_order(y, order), mask};
}

// to = [selected by the mask] from / sqrt(var + eps) weight.
template <typename T>
void scale_grad(const Tensor& flat, const uint8_t* bits, const Vector& weight, const Tensor& var, double eps,
                const Channels& layout, const Tensor& result) {
  const std::vector<T> inverse = inverse_deviation<T>(var, eps);
  const std::vector<T> weights = weight ? values_of<T>(*weight) : std::vector<T>(inverse.size(), T(1));
  const auto& routines = elementwise_of<T>();
  map_blocks<T>(flat.const_data_ptr(), result.mutable_data_ptr(), flat.scalar_type(), flat.numel(),
                [&](const T* from, T* to, int64_t index, int64_t count) {
                  for (int64_t done = 0; done < count; done += block_size) {
                    const int64_t part = std::min(block_size, count - done);
                    const T* source = from + done;
                    if (bits) {
                      routines.select(source, bits + (index + done) / 8, false, T(0), to + done, part);
                      source = to + done;
                    }
                    by_channel(layout, source, inverse, weights, to + done, index + done, part, routines.multiply,
                               routines.multiply_each);
                  }
                });
}

Tensor batch_norm_relu_grad(const Tensor& grad, const Tensor& mask, Vector weight, const Tensor& var, double eps,
                            Sizes order) {
  check_batch_norm("batch_norm_relu_grad", grad, weight, std::nullopt, std::nullopt, var);
  check_order("batch_norm_relu_grad", grad, order);
  check_mask("batch_norm_relu_grad", mask, grad);
  const Tensor flat = in_order(grad, order);
  const Tensor result = empty_in_order(grad, order);
  const Tensor dense = torch::stable::contiguous(mask);
  dispatch_accumulation(accumulation_dtype(grad.scalar_type()), [&](auto value) {
    scale_grad<decltype(value)>(flat, static_cast<const uint8_t*>(dense.const_data_ptr()), weight, var, eps,
                                channels_in(grad, order), result);
  });
  return from_order(result, order);
}

Tensor batch_norm_frozen_grad(const Tensor& grad, Vector weight, const Tensor& var, double eps, Sizes order) {
  check_batch_norm("batch_norm_frozen_grad", grad, weight, std::nullopt, std::nullopt, var);
  check_order("batch_norm_frozen_grad", grad, order);
  const Tensor flat = in_order(grad, order);
  const Tensor result = empty_in_order(grad, order);
  dispatch_accumulation(accumulation_dtype(grad.scalar_type()), [&](auto value) {
    scale_grad<decltype(value)>(flat, nullptr, weight, var, eps, channels_in(grad, order), result);
  });
  return from_order(result, order);
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("batch_norm_relu_mask", TORCH_BOX(&lance::batch_norm_relu_mask));
  m.impl("batch_norm_relu_grad", TORCH_BOX(&lance::batch_norm_relu_grad));
  m.impl("batch_norm_frozen_grad", TORCH_BOX(&lance::batch_norm_frozen_grad));
}
