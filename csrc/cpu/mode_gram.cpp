#include <algorithm>

#include "common.h"

namespace lance {
namespace {

int64_t check_mode(const char* operation, const Tensor& x, int64_t mode) {
  check_floating(operation, "x", x);
  const int64_t modes = x.dim();
  check(-modes <= mode && mode < modes, "lance::", operation, ": mode is ", mode, "; expected one of the ", modes,
        " modes of x, whose shape is ", shape_string(x));
  return mode < 0 ? mode + modes : mode;
}

Sizes check_grams(const std::vector<Tensor>& grams, const Tensor& x, const Sizes& modes) {
  check(grams.size() == modes.size(), "lance::mode_grams_: grams has ", grams.size(),
        " entries; expected one for each of the ", modes.size(), " modes");
  Sizes wrapped;
  for (const int64_t mode : modes) {
    wrapped.push_back(check_mode("mode_grams_", x, mode));
    check(std::count(wrapped.begin(), wrapped.end(), wrapped.back()) == 1, "lance::mode_grams_: modes names mode ",
          mode, " of x twice");
  }
  const bool wide = x.scalar_type() == ScalarType::Double;
  for (size_t index = 0; index < grams.size(); ++index) {
    const Tensor& gram = grams[index];
    const int64_t size = x.size(wrapped[index]);
    check(gram.dim() == 2 && gram.size(0) == size && gram.size(1) == size, "lance::mode_grams_: grams[", index,
          "] has shape ", shape_string(gram), "; expected (", size, ", ", size, ") for mode ", wrapped[index],
          " of x, whose shape is ", shape_string(x));
    const ScalarType dtype = gram.scalar_type();
    check(dtype == ScalarType::Double || (dtype == ScalarType::Float && !wide), "lance::mode_grams_: grams[", index,
          "] has dtype ", dtype_name(dtype), "; expected ", wide ? "" : "torch.float32 or ", "torch.float64 for x of ",
          dtype_name(x.scalar_type()));
    check(gram.is_cpu(), "lance::mode_grams_: grams[", index, "] is not on cpu; expected cpu, where x is");
  }
  return wrapped;
}

// gram (size, size) += sum over outer and inner of x (outer, size, inner) with itself.
template <typename T, typename G>
void add_gram(const T* x, int64_t outer, int64_t size, int64_t inner, G* gram, int64_t row_stride,
              int64_t column_stride) {
  parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        T sum = 0;
        for (int64_t o = 0; o < outer; ++o) {
          const T* left = x + (o * size + i) * inner;
          const T* right = x + (o * size + j) * inner;
          for (int64_t p = 0; p < inner; ++p) {
            sum += left[p] * right[p];
          }
        }
        gram[i * row_stride + j * column_stride] += sum;
      }
    }
  });
}

void mode_grams_(const std::vector<Tensor>& grams, const Tensor& x, const Sizes& modes) {
  const Sizes wrapped = check_grams(grams, x, modes);
  const ScalarType dtype = accumulation_dtype(x.scalar_type());
  const Tensor dense = torch::stable::contiguous(torch::stable::to(x, dtype));
  const Sizes sizes = sizes_of(x);
  for (size_t index = 0; index < grams.size(); ++index) {
    int64_t outer = 1;
    int64_t inner = 1;
    const int64_t mode = wrapped[index];
    for (int64_t other = 0; other < static_cast<int64_t>(sizes.size()); ++other) {
      (other < mode ? outer : inner) *= other == mode ? 1 : sizes[other];
    }
    const Tensor& gram = grams[index];
    dispatch_accumulation(dtype, [&](auto value) {
      using T = decltype(value);
      dispatch_accumulation(gram.scalar_type(), [&](auto gram_value) {
        using G = decltype(gram_value);
        add_gram(dense.const_data_ptr<T>(), outer, sizes[mode], inner, gram.mutable_data_ptr<G>(), gram.stride(0),
                 gram.stride(1));
      });
    });
  }
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("mode_grams_", TORCH_BOX(&lance::mode_grams_));
}
