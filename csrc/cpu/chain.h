// A chain of mode-n products: one strided tensor, a matrix for some of its modes, a dense result.
#pragma once

#include <memory>

#include "memory.h"

namespace lance {

// What a mode is multiplied with: (inputs, outputs), dense rows. `out[..., j, ...] = sum_i in[..., i, ...] data[i, j]`.
template <typename T>
struct Matrix {
  int64_t inputs = 0;
  int64_t outputs = 0;
  Buffer<T> data;
};

// A factor (size, rank) as the matrix that projects onto it, or (transposed) expands by it.
template <typename T>
Matrix<T> projecting(const Tensor& factor);
template <typename T>
Matrix<T> expanding(const Tensor& factor);

// The Kronecker product, for two neighbouring modes taken as one: (left inputs * right inputs, ...).
template <typename T>
Matrix<T> kronecker(const Matrix<T>& left, const Matrix<T>& right);

// One mode of a chain's source; `matrix` may be null.
template <typename T>
struct Mode {
  int64_t size = 1;
  int64_t stride = 0;
  const Matrix<T>* matrix = nullptr;
};

// One product of a chain, over (outer loops, size, inner loops, run) with `run` neighbouring columns.
template <typename T>
struct Step {
  struct Loop {
    int64_t count;
    int64_t source;
    int64_t target;
  };
  const Matrix<T>* matrix = nullptr;  // null for a copy
  ScalarType dtype = dtype_of<T>;
  std::vector<Loop> loops;
  int64_t loop_count = 1;
  bool last = false;  // the mode is the last one: rows of data times the matrix; else the transpose from the left
  int64_t depth = 1;  // size of the mode
  int64_t depth_stride = 1;   // of the source along the mode
  int64_t run = 1;            // rows (last) or columns (else) of the product
  int64_t run_stride = 1;     // of the source along the run
  int64_t target_stride = 1;  // of the target along the run (last) or between rows (else)
  int64_t pieces = 1;         // the run is cut into this many pieces, each `piece` long
  int64_t piece = 1;
  bool gathered = false;  // pieces are first copied to scratch: another dtype, or no neighbouring columns

  int64_t scratch() const {
    return gathered ? depth * piece : 0;
  }
  double cost() const;
  void run_piece(int64_t index, const void* source, T* target, T* scratch) const;
};

// Plans the cheapest order of the products and runs it, one or many times.
//
// There is at least one mode, and none is of size zero; they are given in the order the dense result has them, which
// should be the order of the source in memory. Without any matrix the chain is a copy. The first
// product reads the source in place, through any strides; where its dtype differs or its columns are no neighbours, a
// piece of at most a few thousand elements is copied at a time. The other products go back and forth between two parts
// of the scratch, which hold what the products before them have left over.
template <typename T>
class Chain {
 public:
  Chain(ScalarType dtype, const std::vector<Mode<T>>& modes);

  // Sizes of the result.
  const Sizes& sizes() const {
    return sizes_;
  }
  int64_t scratch() const {
    return scratch_;
  }
  // Vector operations, about.
  double cost() const {
    return cost_;
  }

  // `source` is the first element; `scratch` has room for scratch() elements, `target` for the result.
  void run(const void* source, T* target, T* scratch) const;
  // The same with its products spread over the threads; allocates its own scratch.
  void run_parallel(const void* source, T* target) const;

 private:
  std::vector<Step<T>> steps_;
  std::vector<int64_t> step_offsets_;
  Sizes sizes_;
  int64_t scratch_ = 0;
  int64_t piece_scratch_ = 0;
  double cost_ = 0;
};

extern template class Chain<float>;
extern template class Chain<double>;

}  // namespace lance
