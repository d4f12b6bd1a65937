#include "shifted.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tucker.h"

namespace lance {
namespace {

// The same for some sample of several. Element (sample, q, k) of the core lies at
// sample * sample_stride + q * channel_stride + k * rank_stride.
template <typename T>
Sizes filled_lengths(const Problem& problem, const T* core, int64_t samples, int64_t sample_stride,
                     int64_t channel_stride, int64_t rank_stride) {
  const int64_t lanes = routines().vector_bytes / static_cast<int64_t>(sizeof(T));
  Sizes lengths;
  for (int64_t k = 0; k < problem.rank_count; ++k) {
    int64_t length = problem.rank;
    const auto is_zero = [&](int64_t q) {
      for (int64_t sample = 0; sample < samples; ++sample) {
        if (core[sample * sample_stride + q * channel_stride + k * rank_stride] != T(0)) {
          return false;
        }
      }
      return true;
    };
    while (length > 0 && is_zero(length - 1)) {
      --length;
    }
    lengths.push_back(std::min((length + lanes - 1) / lanes * lanes, problem.rank));
  }
  return lengths;
}

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

}  // namespace

template <typename T>
Sizes first_lengths(const Problem& problem, const Tensor& core) {
  if (problem.channels_expanded) {
    return {};
  }
  Tensor samples = core;
  const Tensor first = torch::stable::contiguous(torch::stable::narrow(samples, 0, 0, 1));
  const Buffer<T> values(first.numel());
  gather(first.const_data_ptr(), first.scalar_type(), 1, 0, first.numel(), 1, values.data(), first.numel());
  Sizes lengths = filled_lengths(problem, values.data(), 1, 0, problem.rank_count, 1);
  const int64_t filled = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  return filled > 0 && 4 * filled < 3 * first.numel() ? lengths : Sizes{};
}

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
Shifted<T>::Shifted(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
                    const Geometry& geometry, Sizes lengths)
    : problem_(problem), grad_(grad_output), core_(core), lengths_(std::move(lengths)) {
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
  samples_last_ = !lengths_.empty() && !outputs_last_ && !batch_;
  core_sample_ = lengths_.empty() ? problem.rank_count * problem.rank : problem.rank;
  core_rank_ = lengths_.empty() ? problem.rank : problem.kept * problem.rank;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t columns = problem.tap_count * problem.rank_count;
  const int64_t fitting = std::max<int64_t>(cached / columns, 1);
  const int64_t share = std::max<int64_t>((problem.outputs + 2 * threads - 1) / (2 * threads), 1);
  block_ = outputs_last_ ? std::min<int64_t>((std::max<int64_t>(fitting, 32) + 15) / 16 * 16, (share + 15) / 16 * 16)
                         : std::min<int64_t>(std::clamp<int64_t>(fitting, 8, 32), share);
  block_ = std::min<int64_t>(block_, problem.outputs);
  chunk_ = batch_ ? problem.samples : std::clamp<int64_t>(cached / (columns * block_), 1, problem.samples);
  if (samples_last_) {
    // Products of a dozen rows, and as many samples for each as the cache has room for.
    block_ = std::min<int64_t>((11 + problem.taps[0]) / problem.taps[0], share);
    chunk_ = std::min<int64_t>(std::clamp<int64_t>(2 * cached / (columns * block_), 8, 64), problem.samples);
    block_ = std::clamp<int64_t>(2 * cached / (columns * chunk_), block_, share);
  }

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
  std::vector<Mode<T>> modes;
  const Mode<T> sample{samples, grad_.stride(0), batch_ ? &*batch_ : nullptr};
  if (!samples_last_) {
    modes.push_back(sample);
  }
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
  if (samples_last_) {
    modes.push_back(sample);
  }
  return modes;
}

template <typename T>
double Shifted<T>::cost() const {
  const double blocks = static_cast<double>(problem_.outputs) / static_cast<double>(block_);
  const double chunks = static_cast<double>(problem_.samples) / static_cast<double>(chunk_);
  return blocks * chunks * Chain<T>(grad_.scalar_type(), modes(chunk_, block_)).cost() + sums_cost();
}

// Of add_sums(): the products, and taking the sums up and down, once for all ranks or once a run. Products of few
// columns fill the registers badly.
template <typename T>
double Shifted<T>::sums_cost() const {
  const double lanes = static_cast<double>(routines().vector_bytes) / sizeof(T);
  const double entries = static_cast<double>(problem_.kept * problem_.outputs * problem_.tap_count);
  if (lengths_.empty()) {
    const double vectors = std::ceil(static_cast<double>(problem_.sum_channels()) / lanes);
    return entries * (static_cast<double>(problem_.rank_count) + 4.0) * vectors;
  }
  double vectors = 0;
  for (const Run& run : runs(lengths_)) {
    const double columns = static_cast<double>(run.filled) / lanes;
    vectors += (columns + 1.5) * (static_cast<double>(run.count) + 8.0 / static_cast<double>(chunk_));
  }
  return entries * vectors;
}

template <typename T>
auto Shifted<T>::runs(const Sizes& lengths) const -> std::vector<Run> {
  // Ranks are neighbours in Q within the last spatial mode, or all of them.
  const int64_t row = merged_ ? problem_.rank_count : problem_.core_ranks.back();
  std::vector<Run> found;
  for (int64_t k = 0; k < problem_.rank_count; ++k) {
    if (k % row > 0 && lengths[k] == lengths[k - 1]) {
      ++found.back().count;
    } else {
      found.push_back({k, 1, lengths[k]});
    }
  }
  std::erase_if(found, [](const Run& run) { return run.filled == 0; });
  return found;
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
// outputs or samples last, (samples, ..., outputs) or (outputs, ..., samples). A product takes as depth the two
// innermost of samples and ranks, so that the sums, which stay in the first cache, are touched seldom; the others are
// loops. With `runs` the depth is the samples and a run's ranks, and the core is turned_core()'s for them.
template <typename T>
void Shifted<T>::add_sums(const T* q, const T* core, int64_t samples, int64_t outputs, int64_t first, T* sums,
                          bool accumulate, const std::vector<Run>& runs) const {
  const Problem& problem = problem_;
  const int64_t step = outputs_last_   ? outputs
                       : samples_last_ ? samples
                                       : 1;  // between neighbouring ranks or taps of Q
  const int64_t columns = problem.tap_count * problem.rank_count;
  const size_t spatial = problem.taps.size();
  const Sizes taps = merged_ ? Sizes{problem.tap_count} : problem.taps;
  const Sizes ranks = merged_ ? Sizes{problem.rank_count} : problem.core_ranks;
  std::vector<Depth> depths{{samples, samples_last_ ? 1 : outputs * columns, core_sample_}};
  Sizes tap_strides(taps.size());
  int64_t q_stride = step;
  int64_t core_stride = core_rank_;
  std::vector<Depth> inner;
  for (size_t mode = merged_ ? 1 : spatial; mode-- > 0;) {
    inner.insert(inner.begin(), {ranks[mode], q_stride, core_stride});
    q_stride *= ranks[mode];
    tap_strides[mode] = q_stride;
    q_stride *= taps[mode];
    core_stride *= ranks[mode];
  }
  depths.insert(depths.end(), inner.begin(), inner.end());
  if (runs.empty()) {
    std::erase_if(depths, [](const Depth& depth) { return depth.count == 1; });
    while (depths.size() < 2) {
      depths.insert(depths.begin(), {1, 0, 0});
    }
  } else {
    std::rotate(depths.begin(), depths.begin() + 1, depths.end());
    depths.insert(depths.end() - 1, {1, step, core_rank_});
    if (!accumulate) {
      std::fill_n(sums, outputs * problem.tap_count * problem.sum_channels(), T(0));
    }
  }
  const Depth outer = depths[depths.size() - 2];
  const Depth innermost = depths.back();
  depths.resize(depths.size() - 2);
  std::vector<Run> loops = runs;
  if (loops.empty()) {
    int64_t count = 1;
    for (const Depth& depth : depths) {
      count *= depth.count;
    }
    for (int64_t loop = 0; loop < count; ++loop) {
      loops.push_back({loop, outer.count, problem.sum_channels()});
    }
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
      for (const Run& run : loops) {
        int64_t index = run.first;
        int64_t q_offset = tap_offset;
        int64_t core_offset = group * problem.group_channels * (problem.channels_expanded ? 1 : 0);
        for (size_t depth = depths.size(); depth-- > 0;) {
          q_offset += index % depths[depth].count * depths[depth].q;
          core_offset += index % depths[depth].count * depths[depth].core;
          index /= depths[depth].count;
        }
        Product<T> p;
        p.outer_depth = run.count;
        p.inner_depth = innermost.count;
        p.accumulate = accumulate || run.first > 0 || !runs.empty();
        if (outputs_last_) {
          p.rows = run.filled;
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
          p.columns = run.filled;
          p.a = q + q_offset + from * columns * (samples_last_ ? samples : 1);
          p.a_row = columns / joined * (samples_last_ ? samples : 1);
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

// (kept, ranks, rank), in T, or with `lengths_` (ranks, kept, rank).
template <typename T>
Tensor Shifted<T>::turned_core() const {
  const int64_t rank = problem_.rank;
  const int64_t ranks = problem_.rank_count;
  Tensor turned = torch::stable::new_empty(core_, {problem_.kept * ranks * rank}, dtype_of<T>);
  const Tensor dense = torch::stable::contiguous(core_);
  parallel_for(0, problem_.kept, 1 + 16384 / (rank * ranks), [&](int64_t begin, int64_t end) {
    for (int64_t entry = begin; entry < end; ++entry) {
      // (rank, ranks) to (ranks, rank)
      const void* from = offset_by(dense.const_data_ptr(), dense.scalar_type(), entry * rank * ranks);
      T* to = turned.mutable_data_ptr<T>() + entry * core_sample_;
      gather(from, dense.scalar_type(), ranks, 1, rank, ranks, to, core_rank_);
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
  std::vector<Run> filled;
  if (!lengths_.empty()) {
    // The first sample alone told the cost: others may have values where it has zeros.
    filled = runs(filled_lengths(problem, core.const_data_ptr<T>(), problem.kept, core_sample_, 1, core_rank_));
  }
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
        add_sums(q.data(), core.const_data_ptr<T>() + entry * core_sample_, batch_ ? problem.kept : samples, outputs,
                 first, sums.data(), sample > 0, filled);
      }
      expand_channels(problem, sums.data(), layout(outputs), outputs, first, matrix ? &*matrix : nullptr, grad_weight);
    }
  });
}

template Sizes first_lengths<float>(const Problem&, const Tensor&);
template void expand_channels<float>(const Problem&, const float*, const SumsLayout&, int64_t, int64_t,
                                     const Matrix<float>*, Tensor&);
template class Shifted<float>;
template Sizes first_lengths<double>(const Problem&, const Tensor&);
template void expand_channels<double>(const Problem&, const double*, const SumsLayout&, int64_t, int64_t,
                                      const Matrix<double>*, Tensor&);
template class Shifted<double>;

}  // namespace lance
