#include "tucker.h"

#include <numeric>

namespace lance {
namespace {

// The modes from the slowest to the fastest in memory. Expanded ones have no place there: the order stays as it is.
Sizes memory_order(const Sizes& sizes, const Sizes& strides, size_t first) {
  Sizes order(sizes.size() - first);
  std::iota(order.begin(), order.end(), static_cast<int64_t>(first));
  for (const int64_t mode : order) {
    if (strides[mode] == 0 && sizes[mode] > 1) {
      return order;
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t left, int64_t right) {
    return sizes[left] > 1 && sizes[right] > 1 && strides[left] > strides[right];
  });
  return order;
}

// The products of the modes `order` names, planned; two small neighbours with matrices may have become one.
template <typename T>
struct Plan {
  std::unique_ptr<Matrix<T>> merged;
  std::unique_ptr<Chain<T>> chain;
};

template <typename T>
Plan<T> make_plan(const Tensor& x, const Sizes& order, const Matrices<T>& matrices) {
  constexpr int64_t largest_merged = 16384;
  std::vector<Mode<T>> modes;
  for (const int64_t mode : order) {
    modes.push_back({x.size(mode), x.stride(mode), matrices[mode] ? &*matrices[mode] : nullptr});
  }
  Plan<T> plan;
  plan.chain = std::make_unique<Chain<T>>(x.scalar_type(), modes);
  if (modes.size() < 2) {
    return plan;
  }
  const Mode<T> left = modes[modes.size() - 2];
  const Mode<T> right = modes.back();
  if (left.matrix && right.matrix && left.stride == right.size * right.stride &&
      left.size * right.size * left.matrix->outputs * right.matrix->outputs <= largest_merged) {
    auto merged = std::make_unique<Matrix<T>>(kronecker(*left.matrix, *right.matrix));
    modes.pop_back();
    modes.back() = {left.size * right.size, right.stride, merged.get()};
    auto chain = std::make_unique<Chain<T>>(x.scalar_type(), modes);
    if (chain->cost() < plan.chain->cost()) {
      plan = {std::move(merged), std::move(chain)};
    }
  }
  return plan;
}

// `sizes` in `order`, the position in `order` of each mode from `first` on: strides of a dense result in logical order.
Sizes logical_strides(const Sizes& sizes, const Sizes& order, size_t first) {
  Sizes strides(order.size());
  int64_t stride = 1;
  for (size_t position = order.size(); position-- > 0;) {
    strides[order[position] - first] = stride;
    stride *= sizes[order[position]];
  }
  return strides;
}

// One chain over all modes, its products spread over the threads.
template <typename T>
void apply_whole(const Tensor& x, const Matrices<T>& matrices, const Sizes& result_sizes, void* result,
                 ScalarType dtype) {
  const Sizes order = memory_order(sizes_of(x), strides_of(x), 0);
  const Plan<T> plan = make_plan(x, order, matrices);
  if (dtype == dtype_of<T> && std::is_sorted(order.begin(), order.end())) {
    plan.chain->run_parallel(x.const_data_ptr(), static_cast<T*>(result));
    return;
  }
  const Buffer<T> dense(count_of(result_sizes));
  plan.chain->run_parallel(x.const_data_ptr(), dense.data());
  permute_copy(dense.data(), result_sizes, logical_strides(result_sizes, order, 0), result, dtype);
}

// A chain for each entry of the first mode, which has no matrix. The big tensor is read once, entry by entry; what the
// products leave over of an entry stays in a thread's scratch, in cache. Threads share out the entries, or, where there
// are too few, the pieces of each product.
template <typename T>
void apply_entries(const Tensor& x, const Matrices<T>& matrices, const Sizes& result_sizes, void* result,
                   ScalarType dtype) {
  const Sizes order = memory_order(sizes_of(x), strides_of(x), 1);
  const Plan<T> plan = make_plan(x, order, matrices);
  const Chain<T>& chain = *plan.chain;
  const Sizes sizes(result_sizes.begin() + 1, result_sizes.end());
  const Sizes strides = logical_strides(result_sizes, order, 1);
  const int64_t count = count_of(sizes);
  const bool direct = dtype == dtype_of<T> && std::is_sorted(order.begin(), order.end());
  const int64_t entries = x.size(0);
  const int64_t threads = torch::stable::get_num_threads();
  const void* source = x.const_data_ptr();
  const auto entry = [&](int64_t index) { return offset_by(source, x.scalar_type(), index * x.stride(0)); };
  const auto target = [&](int64_t index) { return static_cast<char*>(result) + index * count * element_size(dtype); };
  if (entries % threads != 0 && entries < 4 * threads && chain.cost() > 1e5) {
    const Buffer<T> dense(direct ? 0 : count);
    for (int64_t index = 0; index < entries; ++index) {
      chain.run_parallel(entry(index), direct ? reinterpret_cast<T*>(target(index)) : dense.data());
      if (!direct) {
        permute_copy(dense.data(), sizes, strides, target(index), dtype);
      }
    }
    return;
  }
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(20000.0 / std::max(chain.cost(), 1.0)));
  parallel_for(0, entries, grain, [&](int64_t begin, int64_t end) {
    const Buffer<T> scratch(chain.scratch());
    const Buffer<T> dense(direct ? 0 : count);
    for (int64_t index = begin; index < end; ++index) {
      chain.run(entry(index), direct ? reinterpret_cast<T*>(target(index)) : dense.data(), scratch.data());
      if (!direct) {
        permute_copy(dense.data(), sizes, strides, target(index), dtype);
      }
    }
  });
}

}  // namespace

template <typename T>
Tensor multiply_modes(const Tensor& x, Matrices<T> matrices, ScalarType dtype) {
  Sizes sizes = sizes_of(x);
  for (size_t mode = 0; mode < sizes.size(); ++mode) {
    sizes[mode] = matrices[mode] ? matrices[mode]->outputs : sizes[mode];
  }
  Tensor result = torch::stable::new_empty(x, sizes, dtype);
  if (result.numel() == 0) {
    return result;
  }
  if (x.numel() == 0) {
    return torch::stable::zero_(result);
  }
  if (sizes.empty()) {
    return torch::stable::copy_(result, x);
  }
  if (sizes.size() < 3) {
    apply_whole(x, matrices, sizes, result.mutable_data_ptr(), dtype);
    return result;
  }
  if (!matrices[0]) {
    apply_entries(x, matrices, sizes, result.mutable_data_ptr(), dtype);
    return result;
  }
  // With a matrix for the first mode there are two passes, in the order that leaves less between them.
  const bool first_before = matrices[0]->outputs * (x.numel() / x.size(0)) < x.size(0) * (result.numel() / sizes[0]);
  Matrices<T> first(sizes.size());
  first[0] = std::move(matrices[0]);
  matrices[0].reset();
  Sizes between = first_before ? sizes_of(x) : sizes;
  between[0] = first_before ? sizes[0] : x.size(0);
  Tensor middle = torch::stable::new_empty(x, between, dtype_of<T>);
  if (first_before) {
    apply_whole(x, first, between, middle.mutable_data_ptr(), dtype_of<T>);
    apply_entries(middle, matrices, sizes, result.mutable_data_ptr(), dtype);
  } else {
    apply_entries(x, matrices, between, middle.mutable_data_ptr(), dtype_of<T>);
    apply_whole(middle, first, sizes, result.mutable_data_ptr(), dtype);
  }
  return result;
}

template Tensor multiply_modes<float>(const Tensor&, Matrices<float>, ScalarType);
template Tensor multiply_modes<double>(const Tensor&, Matrices<double>, ScalarType);

namespace {

Tensor tucker_project(const Tensor& x, const Factors& factors) {
  check_factors("tucker_project", "x", x, factors, 0);
  return dispatch_accumulation(accumulation_dtype(x.scalar_type()), [&](auto value) {
    return multiply_modes(x, projecting<decltype(value)>(factors), x.scalar_type());
  });
}

Tensor tucker_reconstruct(const Tensor& core, const Factors& factors) {
  check_factors("tucker_reconstruct", "core", core, factors, 1);
  return dispatch_accumulation(accumulation_dtype(core.scalar_type()), [&](auto value) {
    return multiply_modes(core, expanding<decltype(value)>(factors), core.scalar_type());
  });
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("tucker_project", TORCH_BOX(&lance::tucker_project));
  m.impl("tucker_reconstruct", TORCH_BOX(&lance::tucker_reconstruct));
}
