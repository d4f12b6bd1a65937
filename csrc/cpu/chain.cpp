#include "chain.h"

#include <limits>

namespace lance {
namespace {

constexpr int64_t gathered_elements = 8192;
constexpr int64_t parallel_columns = 256;
constexpr int64_t parallel_rows = 96;

template <typename T>
int64_t vectors(int64_t count) {
  const int64_t lanes = routines().vector_bytes / static_cast<int64_t>(sizeof(T));
  return (count + lanes - 1) / lanes;
}

// The step that multiplies mode `position` of a tensor with these sizes and strides.
template <typename T>
Step<T> make_step(const Sizes& sizes, const Sizes& strides, size_t position, const Matrix<T>* matrix,
                  ScalarType dtype) {
  Step<T> step;
  step.matrix = matrix;
  step.dtype = dtype;
  step.last = true;
  for (size_t mode = position + 1; mode < sizes.size(); ++mode) {
    step.last = step.last && sizes[mode] == 1;
  }
  step.depth = sizes[position];
  step.depth_stride = strides[position];
  const int64_t outputs = matrix ? matrix->outputs : sizes[position];

  // Neighbouring modes, innermost first, join the run while their strides continue it.
  std::vector<typename Step<T>::Loop> loops;
  int64_t inner = 1;
  bool started = false;
  const auto visit = [&](size_t mode, int64_t target) {
    if (sizes[mode] == 1) {
      return;
    }
    if (!started) {
      step.run = sizes[mode];
      step.run_stride = strides[mode];
      started = true;
    } else if (loops.empty() && strides[mode] == step.run * step.run_stride) {
      step.run *= sizes[mode];
    } else {
      loops.insert(loops.begin(), {sizes[mode], strides[mode], target});
    }
  };
  if (step.last) {
    int64_t target = outputs;
    for (size_t mode = position; mode-- > 0;) {
      visit(mode, target);
      target *= sizes[mode];
    }
    step.target_stride = outputs;
  } else {
    for (size_t mode = sizes.size(); mode-- > position + 1;) {
      visit(mode, inner);
      inner *= sizes[mode];
    }
    step.target_stride = inner;
    int64_t target = inner * outputs;
    for (size_t mode = position; mode-- > 0;) {
      if (sizes[mode] > 1) {
        loops.insert(loops.begin(), {sizes[mode], strides[mode], target});
      }
      target *= sizes[mode];
    }
  }
  // Loops of no length but one another's continuation become one.
  for (const auto& loop : loops) {
    if (!step.loops.empty() && step.loops.back().source == loop.count * loop.source &&
        step.loops.back().target == loop.count * loop.target) {
      step.loops.back() = {step.loops.back().count * loop.count, loop.source, loop.target};
    } else {
      step.loops.push_back(loop);
    }
    step.loop_count *= loop.count;
  }
  step.gathered = dtype != dtype_of<T> || (!step.last && step.run > 1 && step.run_stride != 1);
  const int64_t longest = step.gathered ? std::max<int64_t>(gathered_elements / std::max<int64_t>(step.depth, 1), 16)
                          : step.last   ? parallel_rows
                                        : parallel_columns;
  step.piece = std::min(step.run, longest);
  step.pieces = step.piece ? (step.run + step.piece - 1) / step.piece : 0;
  return step;
}

// Depth first over the orders in which the remaining matrices can be applied; keeps the cheapest.
template <typename T>
void search(const Sizes& sizes, const Sizes& strides, ScalarType dtype, std::vector<const Matrix<T>*>& remaining,
            std::vector<Step<T>>& steps, double cost, std::vector<Step<T>>& best, double& best_cost) {
  bool done = true;
  for (size_t position = 0; position < sizes.size(); ++position) {
    const Matrix<T>* matrix = remaining[position];
    if (matrix == nullptr) {
      continue;
    }
    done = false;
    Step<T> step = make_step(sizes, strides, position, matrix, dtype);
    const double total = cost + step.cost();
    if (total >= best_cost) {
      continue;
    }
    Sizes next = sizes;
    next[position] = matrix->outputs;
    remaining[position] = nullptr;
    steps.push_back(std::move(step));
    search(next, dense_strides(next), dtype_of<T>, remaining, steps, total, best, best_cost);
    steps.pop_back();
    remaining[position] = matrix;
  }
  if (done && cost < best_cost) {
    best = steps;
    best_cost = cost;
  }
}

// to (rows, columns), dense, from a factor of any floating dtype.
template <typename T>
void gather_any(const Tensor& factor, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride, T* to) {
  const ScalarType dtype = factor.scalar_type();
  const void* from = factor.const_data_ptr();
  if (accumulation_dtype(dtype) == dtype_of<T>) {
    gather(from, dtype, rows, row_stride, columns, column_stride, to, columns);
    return;
  }
  dispatch_floating(dtype, [&](auto value) {
    const auto* source = static_cast<const decltype(value)*>(from);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        to[row * columns + column] = static_cast<T>(source[row * row_stride + column * column_stride]);
      }
    }
  });
}

}  // namespace

template <typename T>
Matrix<T> projecting(const Tensor& factor) {
  Matrix<T> matrix{factor.size(0), factor.size(1), Buffer<T>(factor.numel())};
  const int64_t strides[2] = {factor.stride(0), factor.stride(1)};
  gather_any(factor, matrix.inputs, strides[0], matrix.outputs, strides[1], matrix.data.data());
  return matrix;
}

template <typename T>
Matrix<T> expanding(const Tensor& factor) {
  Matrix<T> matrix{factor.size(1), factor.size(0), Buffer<T>(factor.numel())};
  const int64_t strides[2] = {factor.stride(0), factor.stride(1)};
  gather_any(factor, matrix.inputs, strides[1], matrix.outputs, strides[0], matrix.data.data());
  return matrix;
}

template <typename T>
Matrix<T> kronecker(const Matrix<T>& left, const Matrix<T>& right) {
  Matrix<T> matrix{left.inputs * right.inputs, left.outputs * right.outputs, {}};
  matrix.data = Buffer<T>(matrix.inputs * matrix.outputs);
  T* to = matrix.data.data();
  for (int64_t i = 0; i < left.inputs; ++i) {
    for (int64_t j = 0; j < right.inputs; ++j) {
      for (int64_t p = 0; p < left.outputs; ++p) {
        const T value = left.data.data()[i * left.outputs + p];
        for (int64_t q = 0; q < right.outputs; ++q) {
          *to++ = value * right.data.data()[j * right.outputs + q];
        }
      }
    }
  }
  return matrix;
}

// Multiplications of whole vectors, and what a call, a piece and a copied element cost beside them.
template <typename T>
double Step<T>::cost() const {
  if (matrix == nullptr) {
    return 0.25 * static_cast<double>(loop_count * run * depth);
  }
  const double calls = static_cast<double>(loop_count) * static_cast<double>(pieces);
  const double columns =
      last ? static_cast<double>(vectors<T>(matrix->outputs)) : static_cast<double>(vectors<T>(piece));
  const double rows = last ? static_cast<double>(piece) : static_cast<double>(matrix->outputs);
  const double copied = gathered ? 0.5 * static_cast<double>(depth * piece) : 0.0;
  return calls * (rows * columns * (static_cast<double>(depth) + 4.0) + copied + 40.0);
}

template <typename T>
void Step<T>::run_piece(int64_t index, const void* source, T* target, T* scratch) const {
  const int64_t begin = index % pieces * piece;
  const int64_t count = std::min(piece, this->run - begin);
  int64_t rest = index / pieces;
  int64_t offset = begin * run_stride;
  int64_t target_offset = last ? begin * target_stride : begin;
  for (size_t loop = loops.size(); loop-- > 0;) {
    const int64_t at = rest % loops[loop].count;
    rest /= loops[loop].count;
    offset += at * loops[loop].source;
    target_offset += at * loops[loop].target;
  }
  const void* from = offset_by(source, dtype, offset);
  if (matrix == nullptr) {
    gather(from, dtype, count, run_stride, depth, depth_stride, target + target_offset, target_stride);
    return;
  }
  Product<T> p;
  p.inner_depth = depth;
  p.c = target + target_offset;
  p.c_row = target_stride;
  const T* data = static_cast<const T*>(from);
  int64_t data_run = run_stride;
  int64_t data_depth = depth_stride;
  if (gathered && last) {
    gather(from, dtype, count, run_stride, depth, depth_stride, scratch, depth);
    data = scratch;
    data_run = depth;
    data_depth = 1;
  } else if (gathered) {
    gather(from, dtype, depth, depth_stride, count, run_stride, scratch, count);
    data = scratch;
    data_depth = count;
  }
  if (last) {
    p.rows = count;
    p.columns = matrix->outputs;
    p.a = data;
    p.a_row = data_run;
    p.a_inner = data_depth;
    p.b = matrix->data.data();
    p.b_inner = matrix->outputs;
  } else {
    p.rows = matrix->outputs;
    p.columns = count;
    p.a = matrix->data.data();
    p.a_row = 1;
    p.a_inner = matrix->outputs;
    p.b = data;
    p.b_inner = data_depth;
  }
  product(p);
}

template <typename T>
Chain<T>::Chain(ScalarType dtype, const std::vector<Mode<T>>& modes) {
  Sizes sizes;
  Sizes strides;
  std::vector<const Matrix<T>*> matrices;
  for (const Mode<T>& mode : modes) {
    sizes.push_back(mode.size);
    strides.push_back(mode.stride);
    matrices.push_back(mode.matrix);
    sizes_.push_back(mode.matrix ? mode.matrix->outputs : mode.size);
  }
  std::vector<Step<T>> steps;
  double best_cost = std::numeric_limits<double>::infinity();
  search(sizes, strides, dtype, matrices, steps, 0.0, steps_, best_cost);
  cost_ = best_cost;
  if (steps_.empty()) {
    steps_.push_back(make_step<T>(sizes, strides, sizes.size() - 1, nullptr, dtype));
    cost_ = steps_[0].cost();
  }

  int64_t largest[2] = {0, 0};
  int64_t elements = count_of(sizes);
  for (size_t index = 0; index < steps_.size(); ++index) {
    const Step<T>& step = steps_[index];
    elements = step.matrix ? elements / step.depth * step.matrix->outputs : elements;
    piece_scratch_ = std::max(piece_scratch_, step.scratch());
    if (index + 1 < steps_.size()) {
      largest[index % 2] = std::max(largest[index % 2], elements);
    }
  }
  const auto aligned = [](int64_t count) { return (count + 15) / 16 * 16; };
  piece_scratch_ = aligned(piece_scratch_);
  step_offsets_ = {piece_scratch_, piece_scratch_ + aligned(largest[0])};
  scratch_ = step_offsets_[1] + aligned(largest[1]);
}

template <typename T>
void Chain<T>::run(const void* source, T* target, T* scratch) const {
  for (size_t index = 0; index < steps_.size(); ++index) {
    const Step<T>& step = steps_[index];
    T* to = index + 1 == steps_.size() ? target : scratch + step_offsets_[index % 2];
    for (int64_t piece = 0; piece < step.loop_count * step.pieces; ++piece) {
      step.run_piece(piece, source, to, scratch);
    }
    source = to;
  }
}

template <typename T>
void Chain<T>::run_parallel(const void* source, T* target) const {
  const Buffer<T> scratch(scratch_);
  for (size_t index = 0; index < steps_.size(); ++index) {
    const Step<T>& step = steps_[index];
    T* to = index + 1 == steps_.size() ? target : scratch.data() + step_offsets_[index % 2];
    const int64_t pieces = step.loop_count * step.pieces;
    // Less than some ten thousand vector operations are not worth a thread.
    const double each = step.cost() / static_cast<double>(std::max<int64_t>(pieces, 1));
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(20000.0 / std::max(each, 1.0)));
    parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
      const Buffer<T> own(step.scratch());
      for (int64_t piece = begin; piece < end; ++piece) {
        step.run_piece(piece, source, to, own.data());
      }
    });
    source = to;
  }
}

template struct Step<float>;
template struct Step<double>;
template class Chain<float>;
template class Chain<double>;
template Matrix<float> projecting<float>(const Tensor&);
template Matrix<double> projecting<double>(const Tensor&);
template Matrix<float> expanding<float>(const Tensor&);
template Matrix<double> expanding<double>(const Tensor&);
template Matrix<float> kronecker<float>(const Matrix<float>&, const Matrix<float>&);
template Matrix<double> kronecker<double>(const Matrix<double>&, const Matrix<double>&);

}  // namespace lance
