#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "depthwise.h"
#include "tucker.h"

namespace lance {
namespace {

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
                     const Matrix<T>* feature, Tensor& grad_weight) {
  const ScalarType dtype = grad_weight.scalar_type();
  const int64_t rank = problem.sum_channels();
  const int64_t channels = problem.group_channels;
  const int64_t taps = problem.tap_count;
  const int64_t group_outputs = problem.outputs / problem.groups;
  const int64_t at_once = std::max<int64_t>(12 / taps, 1);
  const Buffer<T> rows(at_once * taps * rank);
  const Buffer<T> products(at_once * taps * channels);
  const Buffer<T> turning(taps * channels);
  for (int64_t output = 0; output < outputs;) {
    const int64_t group = (first + output) / group_outputs;
    const int64_t count = std::min({at_once, outputs - output, (group + 1) * group_outputs - first - output});
    for (int64_t index = 0; index < count; ++index) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* source = sums + (output + index) * from.output + from.offsets[tap];
        T* to = rows.data() + (index * taps + tap) * rank;
        for (int64_t q = 0; q < rank; ++q) {
          to[q] = source[q * from.channel];
        }
      }
    }
    void* target = offset_by(grad_weight.mutable_data_ptr(), dtype, (first + output) * channels * taps);
    const bool direct = taps == 1 && dtype == dtype_of<T>;
    const T* finished = rows.data();
    if (feature != nullptr) {
      Product<T> p;
      p.rows = count * taps;
      p.columns = channels;
      p.inner_depth = rank;
      p.a = rows.data();
      p.a_row = rank;
      p.a_inner = 1;
      p.b = feature->data.data() + group * channels;
      p.b_inner = feature->outputs;
      p.c = direct ? static_cast<T*>(target) : products.data();
      p.c_row = channels;
      product(p);
      finished = products.data();
    }
    if (feature == nullptr || !direct) {
      for (int64_t index = 0; index < count; ++index) {
        void* to = offset_by(target, dtype, index * channels * taps);
        T* turned = dtype == dtype_of<T> ? static_cast<T*>(to) : turning.data();
        // (taps, channels) to (channels, taps)
        gather(finished + index * taps * channels, dtype_of<T>, channels, 1, taps, channels, turned, taps);
        if (dtype != dtype_of<T>) {
          narrow(turned, to, dtype, channels * taps);
        }
      }
    }
    output += count;
  }
}

template <typename T>
class Shifted {
 public:
  Shifted(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
          const Geometry& geometry);

  // Vector operations, about.
  double cost() const;
  void run(const Tensor* feature, Tensor& grad_weight) const;

 private:
  struct Depth {
    int64_t count;
    int64_t q;
    int64_t core;
  };

  std::vector<Mode<T>> modes(int64_t samples, int64_t outputs) const;
  void add_sums(const T* q, const T* core, int64_t samples, int64_t outputs, int64_t first, T* sums,
                bool accumulate) const;
  SumsLayout layout(int64_t outputs) const;
  Tensor turned_core() const;

  const Problem& problem_;
  const Tensor& grad_;
  const Tensor& core_;
  std::vector<Matrix<T>> shifts_;
  std::optional<Matrix<T>> merged_;  // all spatial modes as one, columns (taps..., ranks...)
  std::optional<Matrix<T>> batch_;
  bool outputs_last_;
  int64_t block_;
  int64_t chunk_;
};

// (positions, taps, ranks) with all spatial modes as one, from a matrix of (taps, ranks) columns each.
template <typename T>
Matrix<T> merge(const std::vector<Matrix<T>>& shifts, const Problem& problem) {
  Matrix<T> product;
  for (size_t mode = 0; mode < shifts.size(); ++mode) {
    if (mode == 0) {
      product = Matrix<T>{shifts[0].inputs, shifts[0].outputs, Buffer<T>(shifts[0].inputs * shifts[0].outputs)};
      std::copy_n(shifts[0].data.data(), shifts[0].inputs * shifts[0].outputs, product.data.data());
    } else {
      product = kronecker(product, shifts[mode]);
    }
  }
  // Columns of the product are (tap_1, rank_1, tap_2, rank_2, ...).
  Sizes sizes;
  Sizes order;
  for (size_t mode = 0; mode < shifts.size(); ++mode) {
    sizes.insert(sizes.end(), {problem.taps[mode], problem.core_ranks[mode]});
  }
  const Sizes strides = dense_strides(sizes);
  Sizes permuted_sizes{product.inputs};
  Sizes permuted_strides{product.outputs};
  for (const size_t kind : {0, 1}) {
    for (size_t mode = 0; mode < shifts.size(); ++mode) {
      permuted_sizes.push_back(sizes[2 * mode + kind]);
      permuted_strides.push_back(strides[2 * mode + kind]);
    }
  }
  Matrix<T> merged{product.inputs, product.outputs, Buffer<T>(product.inputs * product.outputs)};
  permute_copy(product.data.data(), permuted_sizes, permuted_strides, merged.data.data(), dtype_of<T>);
  return merged;
}

template <typename T>
Shifted<T>::Shifted(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
                    const Geometry& geometry)
    : problem_(problem), grad_(grad_output), core_(core) {
  constexpr int64_t largest_merged = 32768;
  constexpr int64_t cached = 16384;
  const size_t spatial = problem.taps.size();
  for (size_t mode = 0; mode < spatial; ++mode) {
    const int64_t size = factors[2 + mode] ? factors[2 + mode]->size(0) : core.size(2 + static_cast<int64_t>(mode));
    shifts_.push_back(shifted<T>(factors[2 + mode], size, problem.positions[mode], problem.taps[mode], geometry, mode));
  }
  if (factors[0]) {
    batch_ = projecting<T>(*factors[0]);
  }
  bool spatial_last = false;
  bool neighbours = true;
  for (size_t mode = 0; mode < spatial; ++mode) {
    const int64_t at = 2 + static_cast<int64_t>(mode);
    spatial_last = spatial_last || (grad_.size(at) > 1 && grad_.stride(at) == 1);
    neighbours = neighbours && (mode == 0 || grad_.stride(at - 1) == grad_.size(at) * grad_.stride(at));
  }
  outputs_last_ = grad_.stride(1) == 1 && grad_.size(1) > 1 && !spatial_last;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t columns = problem.tap_count * problem.rank_count;
  const int64_t fitting = std::max<int64_t>(cached / columns, 1);
  const int64_t share = std::max<int64_t>((problem.outputs + 2 * threads - 1) / (2 * threads), 1);
  block_ = outputs_last_ ? std::min<int64_t>((std::max<int64_t>(fitting, 32) + 15) / 16 * 16, (share + 15) / 16 * 16)
                         : std::min<int64_t>(std::clamp<int64_t>(fitting, 8, 32), share);
  block_ = std::min<int64_t>(block_, problem.outputs);
  chunk_ = batch_ ? problem.samples : std::clamp<int64_t>(cached / (columns * block_), 1, problem.samples);

  int64_t positions = 1;
  for (const int64_t count : problem.positions) {
    positions *= count;
  }
  if (spatial > 1 && neighbours && positions * columns <= largest_merged) {
    const double separate = Chain<T>(grad_.scalar_type(), modes(chunk_, block_)).cost();
    merged_ = merge(shifts_, problem);
    if (Chain<T>(grad_.scalar_type(), modes(chunk_, block_)).cost() > separate) {
      merged_.reset();
    }
  }
}

// The modes of a piece of grad_output: `samples` by `outputs` with the matrices that make Q of it.
template <typename T>
std::vector<Mode<T>> Shifted<T>::modes(int64_t samples, int64_t outputs) const {
  std::vector<Mode<T>> modes{{samples, grad_.stride(0), batch_ ? &*batch_ : nullptr}};
  const Mode<T> output{outputs, grad_.stride(1), nullptr};
  if (!outputs_last_) {
    modes.push_back(output);
  }
  const size_t spatial = problem_.taps.size();
  if (merged_) {
    modes.push_back({merged_->inputs, grad_.stride(1 + static_cast<int64_t>(spatial)), &*merged_});
  } else {
    for (size_t mode = 0; mode < spatial; ++mode) {
      modes.push_back({problem_.positions[mode], grad_.stride(2 + static_cast<int64_t>(mode)), &shifts_[mode]});
    }
  }
  if (outputs_last_) {
    modes.push_back(output);
  }
  return modes;
}

template <typename T>
double Shifted<T>::cost() const {
  const double lanes = static_cast<double>(routines().vector_bytes) / sizeof(T);
  const double blocks = static_cast<double>(problem_.outputs) / static_cast<double>(block_);
  const double chunks = static_cast<double>(problem_.samples) / static_cast<double>(chunk_);
  const double channels = static_cast<double>(problem_.sum_channels());
  const double sums = static_cast<double>(problem_.kept * problem_.outputs * problem_.tap_count) *
                      (static_cast<double>(problem_.rank_count) + 4.0) * std::max(channels / lanes, 1.0);
  return blocks * chunks * Chain<T>(grad_.scalar_type(), modes(chunk_, block_)).cost() + sums;
}

// Where the sums of a block of outputs lie; see add_sums.
template <typename T>
SumsLayout Shifted<T>::layout(int64_t outputs) const {
  const int64_t rank = problem_.sum_channels();
  SumsLayout layout;
  if (outputs_last_) {
    layout.output = 1;
    layout.channel = outputs;
    for (int64_t tap = 0; tap < problem_.tap_count; ++tap) {
      layout.offsets.push_back(tap * rank * outputs);
    }
    return layout;
  }
  layout.channel = 1;
  const int64_t joined = merged_ ? problem_.tap_count : problem_.taps[0];
  const int64_t others = problem_.tap_count / joined;
  layout.output = joined * rank;
  for (int64_t tap = 0; tap < problem_.tap_count; ++tap) {
    layout.offsets.push_back((tap % others * outputs * joined + tap / others) * rank);
  }
  return layout;
}

// Adds what `samples` entries of Q contribute. Q is (samples, outputs, (taps, ranks) of each mode or of all) or, with
// outputs last, (samples, ..., outputs). A product takes as depth the two innermost of samples and ranks, so that the
// sums, which stay in the first cache, are touched seldom; the others are loops.
template <typename T>
void Shifted<T>::add_sums(const T* q, const T* core, int64_t samples, int64_t outputs, int64_t first, T* sums,
                          bool accumulate) const {
  const Problem& problem = problem_;
  const int64_t step = outputs_last_ ? outputs : 1;  // between neighbouring ranks or taps of Q
  const int64_t columns = problem.tap_count * problem.rank_count;
  const size_t spatial = problem.taps.size();
  const Sizes taps = merged_ ? Sizes{problem.tap_count} : problem.taps;
  const Sizes ranks = merged_ ? Sizes{problem.rank_count} : problem.core_ranks;
  std::vector<Depth> depths{{samples, outputs * columns, problem.rank_count * problem.rank}};
  Sizes tap_strides(taps.size());
  int64_t q_stride = step;
  int64_t core_stride = problem.rank;
  std::vector<Depth> inner;
  for (size_t mode = merged_ ? 1 : spatial; mode-- > 0;) {
    inner.insert(inner.begin(), {ranks[mode], q_stride, core_stride});
    q_stride *= ranks[mode];
    tap_strides[mode] = q_stride;
    q_stride *= taps[mode];
    core_stride *= ranks[mode];
  }
  depths.insert(depths.end(), inner.begin(), inner.end());
  std::erase_if(depths, [](const Depth& depth) { return depth.count == 1; });
  while (depths.size() < 2) {
    depths.insert(depths.begin(), {1, 0, 0});
  }
  const Depth outer = depths[depths.size() - 2];
  const Depth innermost = depths.back();
  depths.resize(depths.size() - 2);
  int64_t loops = 1;
  for (const Depth& depth : depths) {
    loops *= depth.count;
  }

  const SumsLayout sums_layout = layout(outputs);
  // A product's rows: with outputs last the channels of the core, else outputs and, joined to them, taps.
  const int64_t joined = outputs_last_ ? 1 : taps[0];
  const int64_t tap_products = problem.tap_count / joined;
  const int64_t group_outputs = problem.outputs / problem.groups;
  const int64_t channels = problem.sum_channels();
  for (int64_t from = 0; from < outputs;) {
    // Outputs of one group, whose channels of the expanded core they meet.
    const int64_t group = problem.channels_expanded ? (first + from) / group_outputs : 0;
    const int64_t to = problem.channels_expanded ? std::min(outputs, (group + 1) * group_outputs - first) : outputs;
    for (int64_t tap = 0; tap < tap_products; ++tap) {
      int64_t rest = tap;
      int64_t tap_offset = 0;
      for (size_t mode = taps.size(); mode-- > (outputs_last_ ? 0 : 1);) {
        tap_offset += rest % taps[mode] * tap_strides[mode];
        rest /= taps[mode];
      }
      for (int64_t loop = 0; loop < loops; ++loop) {
        int64_t index = loop;
        int64_t q_offset = tap_offset;
        int64_t core_offset = group * problem.group_channels * (problem.channels_expanded ? 1 : 0);
        for (size_t depth = depths.size(); depth-- > 0;) {
          q_offset += index % depths[depth].count * depths[depth].q;
          core_offset += index % depths[depth].count * depths[depth].core;
          index /= depths[depth].count;
        }
        Product<T> p;
        p.outer_depth = outer.count;
        p.inner_depth = innermost.count;
        p.accumulate = accumulate || loop > 0;
        if (outputs_last_) {
          p.rows = channels;
          p.columns = to - from;
          p.a = core + core_offset;
          p.a_row = 1;
          p.a_outer = outer.core;
          p.a_inner = innermost.core;
          p.b = q + q_offset + from;
          p.b_outer = outer.q;
          p.b_inner = innermost.q;
          p.c = sums + sums_layout.offsets[tap] + from;
          p.c_row = outputs;
        } else {
          p.rows = (to - from) * joined;
          p.columns = channels;
          p.a = q + q_offset + from * columns;
          p.a_row = columns / joined;
          p.a_outer = outer.q;
          p.a_inner = innermost.q;
          p.b = core + core_offset;
          p.b_outer = outer.core;
          p.b_inner = innermost.core;
          p.c = sums + sums_layout.offsets[tap] + from * sums_layout.output;
          p.c_row = channels;
        }
        product(p);
      }
    }
    from = to;
  }
}

// (kept, ranks, rank), in T.
template <typename T>
Tensor Shifted<T>::turned_core() const {
  Tensor turned = torch::stable::new_empty(core_, {problem_.kept, problem_.rank_count, problem_.rank}, dtype_of<T>);
  const Tensor dense = torch::stable::contiguous(core_);
  const int64_t plane = problem_.rank * problem_.rank_count;
  parallel_for(0, problem_.kept, 1 + 16384 / plane, [&](int64_t begin, int64_t end) {
    for (int64_t entry = begin; entry < end; ++entry) {
      // (rank, ranks) to (ranks, rank)
      gather(offset_by(dense.const_data_ptr(), dense.scalar_type(), entry * plane), dense.scalar_type(),
             problem_.rank_count, 1, problem_.rank, problem_.rank_count, turned.mutable_data_ptr<T>() + entry * plane,
             problem_.rank);
    }
  });
  return turned;
}

// A task takes a block of output channels, so that no two write the same sums. A few samples at a time, it makes Q of
// grad_output, which it reads once and in place, and adds Q times the core to its sums; Q and the sums stay in cache.
// Scratch a thread: Q and what precedes it (tens of thousands of elements), the sums (block, taps, rank).
template <typename T>
void Shifted<T>::run(const Tensor* feature, Tensor& grad_weight) const {
  std::optional<Matrix<T>> matrix;
  if (feature != nullptr) {
    matrix = expanding<T>(*feature);
  }
  const Problem& problem = problem_;
  const int64_t blocks = (problem.outputs + block_ - 1) / block_;
  const ScalarType dtype = grad_.scalar_type();
  const Tensor core = turned_core();
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::optional<Chain<T>> whole;
    const int64_t q_samples = batch_ ? problem.kept : chunk_;
    const Buffer<T> q(q_samples * block_ * problem.tap_count * problem.rank_count);
    const Buffer<T> sums(block_ * problem.tap_count * problem.sum_channels());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_;
      const int64_t outputs = std::min(block_, problem.outputs - first);
      for (int64_t sample = 0; sample < problem.samples; sample += chunk_) {
        const int64_t samples = std::min(chunk_, problem.samples - sample);
        const bool usual = samples == chunk_ && outputs == block_;
        if (usual && !whole) {
          whole.emplace(dtype, modes(samples, outputs));
        }
        const std::optional<Chain<T>> rest =
            usual ? std::nullopt : std::optional<Chain<T>>(std::in_place, dtype, modes(samples, outputs));
        const Chain<T>& chain = usual ? *whole : *rest;
        const Buffer<T> scratch(chain.scratch());
        const int64_t offset = sample * grad_.stride(0) + first * grad_.stride(1);
        chain.run(offset_by(grad_.const_data_ptr(), dtype, offset), q.data(), scratch.data());
        const int64_t entry = batch_ ? 0 : sample;
        add_sums(q.data(), core.const_data_ptr<T>() + entry * problem.rank_count * problem.rank,
                 batch_ ? problem.kept : samples, outputs, first, sums.data(), sample > 0);
      }
      expand_channels(problem, sums.data(), layout(outputs), outputs, first, matrix ? &*matrix : nullptr, grad_weight);
    }
  });
}

// aten::convolution_backward, for the weight alone; `weight` gives its size.
Tensor library_weight_grad(const Tensor& grad_output, const Tensor& image, const Tensor& weight, const Sizes& stride,
                           const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Sizes output_padding(stride.size(), 0);
  const std::array<int32_t, 3> wanted{0, 1, 0};
  std::array<AtenTensorHandle, 3> gradients{};
  const int64_t count = static_cast<int64_t>(stride.size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      grad_output.get(), image.get(), weight.get(), nullptr, 0, stride.data(), count, padding.data(), count,
      dilation.data(), count, 0, output_padding.data(), count, groups, wanted.data(), 3, &gradients[0], &gradients[1],
      &gradients[2]));
  for (const size_t unwanted : {0, 2}) {
    if (gradients[unwanted] != nullptr) {
      aoti_torch_delete_tensor_object(gradients[unwanted]);
    }
  }
  return Tensor(gradients[1]);
}

// In the vector operations of Shifted::cost(): the library's products, which fill vectors badly where a group has few
// channels, its passes over what it reorders, and making the image.
template <typename T>
double expanded_cost(const Problem& problem) {
  const double lanes = static_cast<double>(routines().vector_bytes) / sizeof(T);
  const double grad = static_cast<double>(problem.kept * problem.outputs * count_of(problem.positions));
  const double image = static_cast<double>(problem.kept * problem.rank * count_of(problem.input));
  const bool grouped = problem.channels_expanded && problem.groups > 1;
  const double channels = static_cast<double>(std::max<int64_t>(problem.sum_channels(), grouped ? 32 : 8));
  const double products = grad * static_cast<double>(problem.tap_count) * channels / lanes * 1.6;
  const double making = image * (static_cast<double>(problem.core_ranks[0]) / lanes + 0.5);
  return products + grad / 2 + making + 5e4;
}

// The expanded way: the spatial modes of the core are expanded, and the library takes the weight gradient on `rank`
// channels. Scratch: the expanded core, rank / C of x, and for 16-bit dtypes a quarter of grad_output.
template <typename T>
void run_expanded(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
                  const Geometry& geometry, const Tensor* feature, Tensor& grad_weight) {
  const int64_t spatial = static_cast<int64_t>(problem.taps.size());
  bool library_pads = geometry.padding_mode == "zeros";
  Sizes padding;
  for (size_t mode = 0; mode < problem.taps.size(); ++mode) {
    const auto [before, after] = geometry.pads(mode);
    library_pads = library_pads && before == after;
    padding.push_back(before);
  }
  Matrices<T> expand(2);
  for (size_t mode = 0; mode < problem.taps.size(); ++mode) {
    const std::optional<Tensor>& factor = factors[2 + mode];
    if (!library_pads) {
      expand.emplace_back(expanding_padded<T>(
          factor, factor ? factor->size(0) : core.size(2 + static_cast<int64_t>(mode)), geometry, mode));
    } else {
      expand.push_back(factor ? std::optional(expanding<T>(*factor)) : std::nullopt);
    }
  }
  const Tensor image = multiply_modes(core, std::move(expand), dtype_of<T>);
  Tensor grad = grad_output;
  if (factors[0]) {
    Matrices<T> project(static_cast<size_t>(spatial) + 2);
    project[0] = projecting<T>(*factors[0]);
    grad = multiply_modes(grad_output, std::move(project), dtype_of<T>);
  }
  const int64_t channels = problem.sum_channels();
  Sizes thin_size{problem.outputs, channels};
  thin_size.insert(thin_size.end(), problem.taps.begin(), problem.taps.end());
  const Tensor weight = torch::stable::new_empty(image, thin_size);
  const Sizes no_padding(problem.taps.size(), 0);
  const bool converts = grad.scalar_type() != dtype_of<T>;
  const int64_t at_once = converts ? std::max<int64_t>(problem.kept / 4, 1) : problem.kept;
  std::optional<Tensor> thin;
  for (int64_t entry = 0; entry < problem.kept; entry += at_once) {
    const int64_t count = std::min(at_once, problem.kept - entry);
    Tensor every_image = image;
    const Tensor part = library_weight_grad(
        torch::stable::to(torch::stable::narrow(grad, 0, entry, count), dtype_of<T>),
        torch::stable::narrow(every_image, 0, entry, count), weight, geometry.stride,
        library_pads ? padding : no_padding, geometry.dilation, problem.channels_expanded ? geometry.groups : 1);
    thin = thin ? torch::stable::subtract(*thin, part, -1.0) : part;
  }
  const Tensor sums = torch::stable::contiguous(*thin);
  SumsLayout layout{channels * problem.tap_count, problem.tap_count, {}};
  for (int64_t tap = 0; tap < problem.tap_count; ++tap) {
    layout.offsets.push_back(tap);
  }
  std::optional<Matrix<T>> matrix;
  if (feature != nullptr) {
    matrix = expanding<T>(*feature);
  }
  parallel_for(0, problem.outputs, 8, [&](int64_t begin, int64_t end) {
    expand_channels(problem, sums.const_data_ptr<T>() + begin * layout.output, layout, end - begin, begin,
                    matrix ? &*matrix : nullptr, grad_weight);
  });
}

template <typename T>
void run(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
         const Geometry& geometry, const Tensor* feature, Tensor& grad_weight) {
  const Shifted<T> shifted(problem, grad_output, core, factors, geometry);
  const double least = std::min(shifted.cost(), expanded_cost<T>(problem));
  if (Depthwise<T>::fits(problem, factors)) {
    const Depthwise<T> depthwise(problem, grad_output, core, factors, geometry);
    if (depthwise.cost() < least) {
      depthwise.run(grad_weight);
      return;
    }
  }
  if (shifted.cost() == least) {
    shifted.run(feature, grad_weight);
  } else {
    run_expanded<T>(problem, grad_output, core, factors, geometry, feature, grad_weight);
  }
}

Tensor convolution_weight_grad(const Tensor& grad_output, const Tensor& core, const Factors& factors,
                               const Sizes& weight_size, const Sizes& stride, const Sizes& padding,
                               const Sizes& dilation, int64_t groups, const std::string& padding_mode) {
  constexpr const char* operation = "convolution_weight_grad";
  const Geometry geometry{stride, padding, dilation, groups, padding_mode};
  check_factors(operation, "core", core, factors, 1);
  Sizes input_size = sizes_of(core);
  for (size_t mode = 0; mode < factors.size(); ++mode) {
    input_size[mode] = factors[mode] ? factors[mode]->size(0) : input_size[mode];
  }
  const Sizes expected = check_geometry(operation, input_size, weight_size, geometry);
  check(sizes_of(grad_output) == expected, "lance::", operation, ": grad_output has shape ", shape_string(grad_output),
        "; expected ", shape_string(expected), " for an input of size ", shape_string(input_size), " and weight_size ",
        shape_string(weight_size));
  check_same(operation, grad_output, "core", core);

  Tensor grad_weight = torch::stable::new_empty(grad_output, weight_size);
  if (grad_weight.numel() == 0) {
    return grad_weight;
  }
  if (grad_output.numel() == 0 || core.numel() == 0) {
    return torch::stable::zero_(grad_weight);
  }
  Problem problem;
  problem.samples = grad_output.size(0);
  problem.kept = core.size(0);
  problem.outputs = weight_size[0];
  problem.groups = groups;
  problem.group_channels = weight_size[1];
  problem.channels_expanded = !factors[1] || core.size(1) > weight_size[1];
  problem.rank = problem.channels_expanded ? input_size[1] : core.size(1);
  problem.input.assign(input_size.begin() + 2, input_size.end());
  problem.taps.assign(weight_size.begin() + 2, weight_size.end());
  problem.positions.assign(expected.begin() + 2, expected.end());
  const Sizes core_size = sizes_of(core);
  problem.core_ranks.assign(core_size.begin() + 2, core_size.end());
  problem.tap_count = count_of(problem.taps);
  problem.rank_count = count_of(problem.core_ranks);
  dispatch_accumulation(accumulation_dtype(core.scalar_type()), [&](auto value) {
    using T = decltype(value);
    if (problem.channels_expanded && factors[1]) {
      Matrices<T> matrices(core_size.size());
      matrices[1] = expanding<T>(*factors[1]);
      const Tensor wide = multiply_modes(core, std::move(matrices), dtype_of<T>);
      run<T>(problem, grad_output, wide, factors, geometry, nullptr, grad_weight);
    } else {
      run<T>(problem, grad_output, core, factors, geometry, factors[1] ? &*factors[1] : nullptr, grad_weight);
    }
  });
  return grad_weight;
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("convolution_weight_grad", TORCH_BOX(&lance::convolution_weight_grad));
}
