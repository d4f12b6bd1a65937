// The shifted way of a convolution's weight gradient: the spatial factors are moved in place of the image.
#pragma once

#include "depthwise.h"

namespace lance {

// The sums over samples and ranks, sum[o, tap, q] = sum_{b, k} Q[b, o, tap, k] core[b, q, k], leave a task through
// this: element (o, tap, q) lies at o * output + offsets[tap] + q * channel.
struct SumsLayout {
  int64_t output;
  int64_t channel;
  Sizes offsets;
};

// grad_weight[o, c, tap] = sum_q feature[c, q] sums[o, tap, q], or the sums themselves without a factor; the rows of
// the factor are those of o's group. A few outputs at a time are copied to (output, tap, q), multiplied to
// (output, tap, c) and written as (output, c, tap).
template <typename T>
void expand_channels(const Problem& problem, const T* sums, const SumsLayout& from, int64_t outputs, int64_t first,
                     const Matrix<T>* feature, Tensor& grad_weight);

// For every combination of spatial ranks, up to which channel the first sample of a core has a value other than zero,
// rounded up to whole vectors: a core of selected values has few channels where frequencies are high. None where the
// channels are expanded before the products, or less than a quarter is zero.
template <typename T>
Sizes first_lengths(const Problem& problem, const Tensor& core);

template <typename T>
class Shifted {
 public:
  // `lengths` are those of the first sample, which the cost is told by; empty leaves zeros of the core alone.
  Shifted(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
          const Geometry& geometry, Sizes lengths);

  // Vector operations, about.
  double cost() const;
  void run(const Tensor* feature, Tensor& grad_weight) const;

 private:
  struct Depth {
    int64_t count;
    int64_t q;
    int64_t core;
  };
  // Neighbouring combinations of ranks of which the same channels are filled.
  struct Run {
    int64_t first;
    int64_t count;
    int64_t filled;
  };

  std::vector<Mode<T>> modes(int64_t samples, int64_t outputs) const;
  void add_sums(const T* q, const T* core, int64_t samples, int64_t outputs, int64_t first, T* sums, bool accumulate,
                const std::vector<Run>& runs) const;
  SumsLayout layout(int64_t outputs) const;
  Tensor turned_core() const;
  std::vector<Run> runs(const Sizes& lengths) const;
  double sums_cost() const;

  const Problem& problem_;
  const Tensor& grad_;
  const Tensor& core_;
  std::vector<Matrix<T>> shifts_;
  std::optional<Matrix<T>> merged_;  // all spatial modes as one, columns (taps..., ranks...)
  std::optional<Matrix<T>> batch_;
  Sizes lengths_;
  bool outputs_last_;
  bool samples_last_;
  int64_t block_;
  int64_t chunk_;
  int64_t core_sample_;  // strides of turned_core()
  int64_t core_rank_;
};

}  // namespace lance
