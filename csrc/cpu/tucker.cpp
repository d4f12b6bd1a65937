#include "common.h"

namespace lance {
namespace {

// out (outer, rank, inner) = in (outer, size, inner) x_1 factor^T, factor (size, rank).
template <typename T>
void project_mode(const T* in, const T* factor, T* out, int64_t outer, int64_t size, int64_t rank, int64_t inner) {
  parallel_for(0, outer, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t r = 0; r < rank; ++r) {
        T* row = out + (o * rank + r) * inner;
        for (int64_t i = 0; i < inner; ++i) {
          row[i] = 0;
        }
        for (int64_t s = 0; s < size; ++s) {
          const T weight = factor[s * rank + r];
          const T* source = in + (o * size + s) * inner;
          for (int64_t i = 0; i < inner; ++i) {
            row[i] += weight * source[i];
          }
        }
      }
    }
  });
}

Tensor tucker_project(const Tensor& x, const Factors& factors) {
  check_factors("tucker_project", "x", x, factors, 0);
  const ScalarType dtype = accumulation_dtype(x.scalar_type());
  Tensor current =
      torch::stable::contiguous(torch::stable::to(x, dtype, std::nullopt, std::nullopt, std::nullopt, false, true));
  Sizes sizes = sizes_of(x);
  for (size_t mode = 0; mode < factors.size(); ++mode) {
    if (!factors[mode].has_value()) {
      continue;
    }
    const Tensor factor = torch::stable::contiguous(torch::stable::to(*factors[mode], dtype));
    int64_t outer = 1;
    int64_t inner = 1;
    for (size_t other = 0; other < sizes.size(); ++other) {
      (other < mode ? outer : inner) *= other == mode ? 1 : sizes[other];
    }
    const int64_t size = sizes[mode];
    const int64_t rank = factor.size(1);
    sizes[mode] = rank;
    Tensor next = torch::stable::new_empty(current, sizes);
    dispatch_accumulation(dtype, [&](auto value) {
      using T = decltype(value);
      project_mode(current.const_data_ptr<T>(), factor.const_data_ptr<T>(), next.mutable_data_ptr<T>(), outer, size,
                   rank, inner);
    });
    current = next;
  }
  return torch::stable::to(current, x.scalar_type());
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("tucker_project", TORCH_BOX(&lance::tucker_project));
}
