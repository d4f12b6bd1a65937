#include "layout.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace lance {
namespace {

Tensor permute(const Tensor& x, const Sizes& order) {
  if (std::is_sorted(order.begin(), order.end())) {
    return x;
  }
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(order)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::permute", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

void check_order(const char* operation, const Tensor& x, const Sizes& order) {
  Sizes sorted = order;
  std::sort(sorted.begin(), sorted.end());
  Sizes expected(x.dim());
  std::iota(expected.begin(), expected.end(), 0);
  if (sorted != expected) {
    std::string given = shape_string(order);
    given.front() = '[';
    given.back() = ']';
    check(false, "lance::", operation, ": order is ", given, "; expected a permutation of the ", x.dim(),
          " dimensions of a tensor of shape ", shape_string(x));
  }
}

Tensor in_order(const Tensor& x, const Sizes& order) {
  return torch::stable::contiguous(permute(x, order));
}

Tensor from_order(const Tensor& flat, const Sizes& order) {
  Sizes inverse(order.size());
  for (size_t position = 0; position < order.size(); ++position) {
    inverse[order[position]] = static_cast<int64_t>(position);
  }
  return permute(flat, inverse);
}

Tensor empty_in_order(const Tensor& x, const Sizes& order) {
  Sizes sizes;
  for (const int64_t dimension : order) {
    sizes.push_back(x.size(dimension));
  }
  return torch::stable::new_empty(x, sizes);
}

}  // namespace lance
