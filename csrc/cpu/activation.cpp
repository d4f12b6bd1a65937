#include "blocks.h"

namespace lance {
namespace {

struct NamedGrids {
  const char* name;
  DerivativeGrid::Kind kind;
  // steps and zero for 8 and for 4 bits, as in lance_kernels/ops/activation.py.
  int32_t eight[2];
  int32_t four[2];
};

constexpr NamedGrids grids[] = {
    {"gelu", DerivativeGrid::gelu, {200, 26}, {11, 1}},
    {"gelu_tanh", DerivativeGrid::gelu_tanh, {200, 26}, {11, 1}},
    {"silu", DerivativeGrid::silu, {210, 21}, {12, 1}},
    {"quick_gelu", DerivativeGrid::quick_gelu, {210, 21}, {12, 1}},
    {"hardswish", DerivativeGrid::hardswish, {126, 63}, {7, 3}},
    {"sigmoid", DerivativeGrid::sigmoid, {1016, 0}, {56, 0}},
    {"tanh", DerivativeGrid::tanh, {254, 0}, {14, 0}},
    {"hardsigmoid", DerivativeGrid::hardsigmoid, {6, 0}, {6, 0}},
};

DerivativeGrid grid_of(const char* operation, const std::string& kind, int64_t bits) {
  check(bits == 4 || bits == 8, "lance::", operation, ": bits is ", bits, "; expected 8 or 4");
  for (const NamedGrids& named : grids) {
    if (kind == named.name) {
      const int32_t* values = bits == 8 ? named.eight : named.four;
      return {named.kind, values[0], values[1], bits == 8 ? 255 : 15};
    }
  }
  check(false, "lance::", operation, ": kind is '", kind,
        "'; expected one of gelu, gelu_tanh, silu, quick_gelu, hardswish, sigmoid, tanh, hardsigmoid");
  return {};
}

int64_t code_bytes(const Tensor& x, int64_t bits) {
  return bits == 8 ? x.numel() : (x.numel() + 1) / 2;
}

Tensor activation_codes(const Tensor& x, std::string kind, int64_t bits, Sizes order) {
  check_floating("activation_codes", "x", x);
  const DerivativeGrid grid = grid_of("activation_codes", kind, bits);
  check_order("activation_codes", x, order);
  const Tensor flat = in_order(x, order);
  const Tensor codes = torch::stable::new_empty(x, {code_bytes(x, bits)}, ScalarType::Byte);
  uint8_t* to = static_cast<uint8_t*>(codes.mutable_data_ptr());
  dispatch_accumulation(accumulation_dtype(x.scalar_type()), [&](auto value) {
    using T = decltype(value);
    const auto& routines = elementwise_of<T>();
    read_blocks<T>(flat.const_data_ptr(), x.scalar_type(), x.numel(), [&](const T* from, int64_t index, int64_t count) {
      if (bits == 8) {
        routines.derivative_codes(grid, from, to + index, count);
        return;
      }
      uint8_t single[block_size + 1];
      for (int64_t done = 0; done < count; done += block_size) {
        const int64_t part = std::min(block_size, count - done);
        routines.derivative_codes(grid, from + done, single, part);
        single[part] = 0;
        uint8_t* pairs = to + (index + done) / 2;
        for (int64_t pair = 0; pair < (part + 1) / 2; ++pair) {
          pairs[pair] = static_cast<uint8_t>(single[2 * pair] | single[2 * pair + 1] << 4);
        }
      }
    });
  });
  return codes;
}

Tensor activation_grad(const Tensor& grad, const Tensor& codes, std::string kind, int64_t bits, Sizes order) {
  check_floating("activation_grad", "grad", grad);
  const DerivativeGrid grid = grid_of("activation_grad", kind, bits);
  check_order("activation_grad", grad, order);
  if (codes.scalar_type() != ScalarType::Byte || codes.dim() != 1 || codes.size(0) != code_bytes(grad, bits)) {
    check(false, "lance::activation_grad: codes has dtype ", dtype_name(codes.scalar_type()), " and shape ",
          shape_string(codes), "; expected torch.uint8 and ", shape_string(Sizes{code_bytes(grad, bits)}), ", ", bits,
          " bits an element of ", shape_string(grad));
  }
  const Tensor flat = in_order(grad, order);
  const Tensor dense = torch::stable::contiguous(codes);
  const Tensor result = empty_in_order(grad, order);
  const uint8_t* kept = static_cast<const uint8_t*>(dense.const_data_ptr());
  dispatch_accumulation(accumulation_dtype(grad.scalar_type()), [&](auto value) {
    using T = decltype(value);
    const auto& routines = elementwise_of<T>();
    map_blocks<T>(flat.const_data_ptr(), result.mutable_data_ptr(), grad.scalar_type(), grad.numel(),
                  [&](const T* from, T* to, int64_t index, int64_t count) {
                    if (bits == 8) {
                      routines.apply_codes(grid, from, kept + index, to, count);
                      return;
                    }
                    uint8_t single[block_size + 1];
                    for (int64_t done = 0; done < count; done += block_size) {
                      const int64_t part = std::min(block_size, count - done);
                      const uint8_t* pairs = kept + (index + done) / 2;
                      for (int64_t pair = 0; pair < (part + 1) / 2; ++pair) {
                        single[2 * pair] = pairs[pair] & 15;
                        single[2 * pair + 1] = pairs[pair] >> 4;
                      }
                      routines.apply_codes(grid, from + done, single, to + done, part);
                    }
                  });
  });
  return from_order(result, order);
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("activation_codes", TORCH_BOX(&lance::activation_codes));
  m.impl("activation_grad", TORCH_BOX(&lance::activation_grad));
}
