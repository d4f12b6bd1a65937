#include "depthwise.h"

namespace lance {
namespace {

// Columns in the order (phase, position), column = stride * position + phase, so that a strided kernel reads
// neighbours.
template <typename T>
Matrix<T> by_phase(const Matrix<T>& matrix, int64_t stride) {
  const int64_t positions = (matrix.outputs + stride - 1) / stride;
  Matrix<T> sorted{matrix.inputs, positions * stride, Buffer<T>(matrix.inputs * positions * stride)};
  for (int64_t row = 0; row < matrix.inputs; ++row) {
    for (int64_t column = 0; column < sorted.outputs; ++column) {
      const int64_t from = column % positions * stride + column / positions;
      sorted.data.data()[row * sorted.outputs + column] =
          from < matrix.outputs ? matrix.data.data()[row * matrix.outputs + from] : T(0);
    }
  }
  return sorted;
}

}  // namespace

template <typename T>
bool Depthwise<T>::fits(const Problem& problem, const Factors& factors) {
  return problem.channels_expanded && problem.group_channels == 1 && problem.taps.size() == 2 && !factors[0] &&
         factors[2] && factors[3];
}

template <typename T>
Depthwise<T>::Depthwise(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
                        const Geometry& geometry)
    : problem_(problem), grad_(grad_output) {
  constexpr int64_t largest_merged = 16384;
  constexpr int64_t cached = 32768;
  core_ = torch::stable::contiguous(torch::stable::to(core, dtype_of<T>));
  height_ = expanding_padded<T>(factors[2], factors[2]->size(0), geometry, 0);
  width_ = by_phase(expanding_padded<T>(factors[3], factors[3]->size(0), geometry, 1), geometry.stride[1]);
  const int64_t positions = width_.outputs / geometry.stride[1];
  for (int64_t i = 0; i < problem.taps[0]; ++i) {
    for (int64_t j = 0; j < problem.taps[1]; ++j) {
      const int64_t column = geometry.dilation[1] * j;
      offsets_.push_back(geometry.dilation[0] * i * width_.outputs + column % geometry.stride[1] * positions +
                         column / geometry.stride[1]);
    }
  }
  image_row_ = geometry.stride[0] * width_.outputs;
  image_ = height_.outputs * width_.outputs;
  block_ = std::clamp<int64_t>(cached / image_, 1, 16);
  in_place_ = grad_.scalar_type() == dtype_of<T> && (grad_.size(3) == 1 || grad_.stride(3) == 1);
  if (height_.inputs * width_.inputs * image_ <= largest_merged) {
    const double separate = Chain<T>(dtype_of<T>, modes(block_)).cost();
    merged_ = kronecker(height_, width_);
    if (Chain<T>(dtype_of<T>, modes(block_)).cost() > separate) {
      merged_.reset();
    }
  }
}

template <typename T>
std::vector<Mode<T>> Depthwise<T>::modes(int64_t channels) const {
  const int64_t ranks = height_.inputs * width_.inputs;
  if (merged_) {
    return {{channels, ranks, nullptr}, {ranks, 1, &*merged_}};
  }
  return {{channels, ranks, nullptr}, {height_.inputs, width_.inputs, &height_}, {width_.inputs, 1, &width_}};
}

template <typename T>
double Depthwise<T>::cost() const {
  const int64_t lanes = routines().vector_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t vectors = problem_.positions[0] * ((problem_.positions[1] + lanes - 1) / lanes);
  const double each = Chain<T>(dtype_of<T>, modes(block_)).cost() / static_cast<double>(block_);
  const double copied = in_place_ ? 0.0 : 0.25 * static_cast<double>(count_of(problem_.positions));
  const double multiplier = static_cast<double>(problem_.outputs) / static_cast<double>(problem_.groups);
  return static_cast<double>(problem_.samples * problem_.groups) *
         (each + multiplier * (static_cast<double>(vectors * problem_.tap_count) * 1.5 + copied + 40.0));
}

// The channels of a block, sample by sample: their images, then every tap's sums, lane by lane; the lanes are added up
// last. Scratch a thread: the images of a block and what precedes them, and the block's grad_output where it cannot be
// read in place.
template <typename T>
void Depthwise<T>::run_channels(int64_t first, int64_t count, Tensor& grad_weight) const {
  constexpr int64_t taps_at_once = 9;
  const int64_t lanes = routines().vector_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t multiplier = problem_.outputs / problem_.groups;
  const int64_t outputs = count * multiplier;
  const int64_t ranks = height_.inputs * width_.inputs;
  const int64_t plane = count_of(problem_.positions);
  const int64_t columns = problem_.positions[1];
  const Chain<T> chain(dtype_of<T>, modes(count));
  const Buffer<T> scratch(chain.scratch());
  const Buffer<T> images(count * image_);
  const Buffer<T> sums(outputs * problem_.tap_count * lanes);
  const Buffer<T> copied(in_place_ ? 0 : outputs * plane);
  std::fill_n(sums.data(), outputs * problem_.tap_count * lanes, T(0));
  const Sizes strides = strides_of(grad_);
  const ScalarType dtype = grad_.scalar_type();
  for (int64_t sample = 0; sample < problem_.samples; ++sample) {
    chain.run(core_.const_data_ptr<T>() + (sample * problem_.groups + first) * ranks, images.data(), scratch.data());
    const void* grad = offset_by(grad_.const_data_ptr(), dtype, sample * strides[0] + first * multiplier * strides[1]);
    if (!in_place_ && strides[2] == columns * strides[3]) {
      gather(grad, dtype, outputs, strides[1], plane, strides[3], copied.data(), plane);
    } else if (!in_place_) {
      for (int64_t row = 0; row < problem_.positions[0]; ++row) {
        const void* from = offset_by(grad, dtype, row * strides[2]);
        gather(from, dtype, outputs, strides[1], columns, strides[3], copied.data() + row * columns, plane);
      }
    }
    for (int64_t output = 0; output < outputs; ++output) {
      Correlation<T> c;
      c.grad = in_place_ ? static_cast<const T*>(grad) + output * strides[1] : copied.data() + output * plane;
      c.grad_row = in_place_ ? strides[2] : columns;
      c.rows = problem_.positions[0];
      c.columns = columns;
      c.image = images.data() + output / multiplier * image_;
      c.image_row = image_row_;
      for (int64_t tap = 0; tap < problem_.tap_count; tap += taps_at_once) {
        c.taps = std::min(taps_at_once, problem_.tap_count - tap);
        c.offsets = offsets_.data() + tap;
        c.sums = sums.data() + (output * problem_.tap_count + tap) * lanes;
        correlate(c);
      }
    }
  }
  const int64_t weights = outputs * problem_.tap_count;
  for (int64_t index = 0; index < weights; ++index) {
    T sum = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      sum += sums.data()[index * lanes + lane];
    }
    sums.data()[index] = sum;  // behind what is still to be added up
  }
  const ScalarType result = grad_weight.scalar_type();
  narrow(sums.data(), offset_by(grad_weight.mutable_data_ptr(), result, first * multiplier * problem_.tap_count),
         result, weights);
}

template <typename T>
void Depthwise<T>::run(Tensor& grad_weight) const {
  const int64_t blocks = (problem_.groups + block_ - 1) / block_;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_;
      run_channels(first, std::min(block_, problem_.groups - first), grad_weight);
    }
  });
}

template class Depthwise<float>;
template class Depthwise<double>;

}  // namespace lance
