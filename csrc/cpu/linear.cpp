#include "tucker.h"

namespace lance {
namespace {

void check_weight_grad(const Tensor& grad_output, const Tensor& core, const Factors& factors) {
  check_factors("linear_weight_grad", "core", core, factors, 1);
  check_same("linear_weight_grad", grad_output, "core", core);
  Sizes leading;
  for (int64_t mode = 0; mode + 1 < core.dim(); ++mode) {
    leading.push_back(factors[mode] ? factors[mode]->size(0) : core.size(mode));
  }
  Sizes given = sizes_of(grad_output);
  const bool same_modes = core.dim() > 0 && grad_output.dim() == core.dim();
  given.resize(same_modes ? given.size() - 1 : given.size());
  check(same_modes && given == leading, "lance::linear_weight_grad: grad_output has shape ", shape_string(grad_output),
        "; expected (", list_string(leading), ", O), the input's leading modes as core, of shape ", shape_string(core),
        ", and factors give them");
}

// What one call computes: grad_weight (O, D) = (sum over the leading modes of P^T kept) feature.
template <typename T>
struct Plan {
  std::vector<Mode<T>> leading;  // of grad_output, with the matrix that projects each, if it is projected
  int64_t entries = 1;           // of the outermost leading mode, or chunks of it; taken one at a time
  int64_t entry_stride = 0;
  int64_t entry_rows = 1;     // rows of kept an entry meets
  int64_t last_rows = 1;      // the same for the last entry, which may be a shorter chunk
  int64_t outputs = 0;        // O
  int64_t output_stride = 1;  // of grad_output
  int64_t rank = 0;           // columns of kept
  int64_t inputs = 0;         // D
  int64_t block = 0;          // output features a task takes
};

// The entries of one block of output features: where they can be read in place, their rows, and else the chain that
// projects (or copies) them.
template <typename T>
struct Block {
  std::unique_ptr<Chain<T>> chain;
  int64_t row_stride = 0;
};

template <typename T>
Block<T> make_block(const Plan<T>& plan, ScalarType dtype, int64_t outputs, int64_t rows) {
  std::vector<Mode<T>> modes = plan.leading;
  if (plan.entry_rows != plan.last_rows && modes.size() == 1) {
    modes[0].size = rows;
  }
  bool in_place = dtype == dtype_of<T> && (plan.output_stride == 1 || outputs == 1);
  for (size_t mode = 0; mode < modes.size(); ++mode) {
    in_place = in_place && modes[mode].matrix == nullptr;
    in_place = in_place && (mode == 0 || modes[mode - 1].stride == modes[mode].size * modes[mode].stride);
  }
  if (in_place) {
    return {nullptr, modes.back().stride};
  }
  modes.push_back({outputs, plan.output_stride, nullptr});
  return {std::make_unique<Chain<T>>(dtype, modes), outputs};
}

// A task takes a block of output features, so that no two write the same sums. Entry by entry of the outermost mode it
// projects grad_output (rows, block) to P (rank, block), which stays in the first cache, and adds kept^T P to its sums
// (rank, block), which stay in the second. grad_output is read once. Scratch a thread: P, the sums, and what the
// chain needs.
template <typename T>
void run_block(const Plan<T>& plan, const Tensor& grad_output, const T* kept, const T* feature, int64_t begin,
               int64_t count, Tensor& grad_weight) {
  const ScalarType dtype = grad_output.scalar_type();
  const Block<T> whole = make_block(plan, dtype, count, plan.entry_rows);
  const Block<T> rest = make_block(plan, dtype, count, plan.last_rows);
  const Buffer<T> projected(whole.chain ? plan.entry_rows * count : 0);
  const Buffer<T> scratch(whole.chain ? std::max(whole.chain->scratch(), rest.chain->scratch()) : 0);
  const bool wide = dtype == dtype_of<T>;
  char* target = static_cast<char*>(grad_weight.mutable_data_ptr()) + begin * plan.inputs * element_size(dtype);
  // Without a feature factor the sums are the result's rows (block, D) themselves.
  const Buffer<T> own(feature ? plan.rank * count : wide ? 0 : count * plan.inputs);
  T* sums = feature || !wide ? own.data() : reinterpret_cast<T*>(target);
  const void* source = offset_by(grad_output.const_data_ptr(), dtype, begin * plan.output_stride);
  for (int64_t entry = 0; entry < plan.entries; ++entry) {
    const bool is_last = entry + 1 == plan.entries;
    const Block<T>& block = is_last ? rest : whole;
    const void* at = offset_by(source, dtype, entry * plan.entry_stride);
    if (block.chain) {
      block.chain->run(at, projected.data(), scratch.data());
      at = projected.data();
    }
    Product<T> p;
    const T* rows = static_cast<const T*>(at);
    const T* kept_rows = kept + entry * plan.entry_rows * plan.rank;
    p.inner_depth = is_last ? plan.last_rows : plan.entry_rows;
    p.a = feature ? kept_rows : rows;
    p.a_row = 1;
    p.a_inner = feature ? plan.rank : block.row_stride;
    p.b = feature ? rows : kept_rows;
    p.b_inner = feature ? block.row_stride : plan.rank;
    p.rows = feature ? plan.rank : count;
    p.columns = feature ? count : plan.rank;
    p.c = sums;
    p.c_row = p.columns;
    p.accumulate = entry > 0;
    product(p);
  }
  if (!feature) {
    if (!wide) {
      narrow(sums, target, dtype, count * plan.inputs);
    }
    return;
  }
  constexpr int64_t rows_at_once = 24;
  const Buffer<T> rows(wide ? 0 : rows_at_once * plan.inputs);
  for (int64_t row = 0; row < count; row += rows_at_once) {
    void* to = target + row * plan.inputs * element_size(dtype);
    Product<T> p;
    p.rows = std::min(rows_at_once, count - row);
    p.columns = plan.inputs;
    p.inner_depth = plan.rank;
    p.a = sums + row;
    p.a_row = 1;
    p.a_inner = count;
    p.b = feature;
    p.b_inner = plan.inputs;
    p.c = wide ? static_cast<T*>(to) : rows.data();
    p.c_row = plan.inputs;
    product(p);
    if (!wide) {
      narrow(rows.data(), to, dtype, p.rows * plan.inputs);
    }
  }
}

// Whether projecting grad_output onto the leading factors takes fewer operations than expanding the core by them.
bool projects(const Tensor& grad_output, const Tensor& core, const Factors& factors) {
  const double outputs = static_cast<double>(grad_output.size(-1));
  const double rank = static_cast<double>(core.size(-1));
  double rows = 1;
  double kept_rows = 1;
  double smallest = 0;
  for (int64_t mode = 0; mode + 1 < core.dim(); ++mode) {
    rows *= static_cast<double>(grad_output.size(mode));
    kept_rows *= static_cast<double>(core.size(mode));
    const double share = static_cast<double>(core.size(mode));
    smallest = factors[mode] && (smallest == 0 || share < smallest) ? share : smallest;
  }
  // The first projection meets all of grad_output; what follows it is small beside it.
  return rows * outputs * smallest + kept_rows * outputs * rank < rows * outputs * rank;
}

template <typename T>
void run(const Tensor& grad_output, const Tensor& core, const Factors& factors, Tensor& grad_weight) {
  constexpr int64_t rows_at_once = 256;
  constexpr int64_t largest_block = 128;
  const int64_t leading = core.dim() - 1;
  const bool project = projects(grad_output, core, factors);
  Factors expanded(factors.size());
  Factors projected(factors.begin(), factors.end() - 1);
  if (!project) {
    std::copy_n(factors.begin(), leading, expanded.begin());
    projected.assign(projected.size(), std::nullopt);
  }
  // (rows, rank): the core, its leading modes expanded unless grad_output's are projected.
  const Tensor kept = multiply_modes(core, expanding<T>(expanded), dtype_of<T>);
  const Matrices<T> matrices = projecting<T>(projected);
  std::optional<Matrix<T>> feature;
  if (factors.back()) {
    feature = expanding<T>(*factors.back());
  }

  Plan<T> plan;
  plan.outputs = grad_output.size(-1);
  plan.output_stride = grad_output.stride(-1);
  plan.rank = kept.size(-1);
  plan.inputs = grad_weight.size(1);
  plan.entry_rows = kept.numel() / plan.rank;
  for (int64_t mode = 0; mode < leading; ++mode) {
    const Matrix<T>* matrix = matrices[mode] ? &*matrices[mode] : nullptr;
    plan.leading.push_back({grad_output.size(mode), grad_output.stride(mode), matrix});
  }
  if (leading == 0) {
    plan.leading.push_back({1, 0, nullptr});
  }
  Mode<T>& outermost = plan.leading.front();
  if (outermost.matrix == nullptr && leading == 1) {
    plan.entries = (outermost.size + rows_at_once - 1) / rows_at_once;
    plan.entry_stride = rows_at_once * outermost.stride;
    plan.last_rows = outermost.size - (plan.entries - 1) * rows_at_once;
    plan.entry_rows = std::min(rows_at_once, outermost.size);
    outermost.size = plan.entry_rows;
  } else if (outermost.matrix == nullptr && leading > 1) {
    plan.entries = outermost.size;
    plan.entry_stride = outermost.stride;
    plan.entry_rows /= plan.entries;
    plan.last_rows = plan.entry_rows;
    plan.leading.erase(plan.leading.begin());
  } else {
    plan.last_rows = plan.entry_rows;
  }

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (plan.outputs + threads - 1) / threads;
  plan.block = std::min(largest_block, (share + 15) / 16 * 16);
  const int64_t blocks = (plan.outputs + plan.block - 1) / plan.block;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * plan.block;
      run_block(plan, grad_output, kept.const_data_ptr<T>(), feature ? feature->data.data() : nullptr, first,
                std::min(plan.block, plan.outputs - first), grad_weight);
    }
  });
}

Tensor linear_weight_grad(const Tensor& grad_output, const Tensor& core, const Factors& factors) {
  check_weight_grad(grad_output, core, factors);
  const int64_t inputs = factors.back() ? factors.back()->size(0) : core.size(-1);
  Tensor grad_weight = torch::stable::new_empty(grad_output, {grad_output.size(-1), inputs});
  if (grad_weight.numel() == 0) {
    return grad_weight;
  }
  if (grad_output.numel() == 0 || core.numel() == 0) {
    return torch::stable::zero_(grad_weight);
  }
  dispatch_accumulation(accumulation_dtype(core.scalar_type()),
                        [&](auto value) { run<decltype(value)>(grad_output, core, factors, grad_weight); });
  return grad_weight;
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("linear_weight_grad", TORCH_BOX(&lance::linear_weight_grad));
}
