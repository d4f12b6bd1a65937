// Weight gradient of a depthwise convolution, and the sizes that all ways of computing a weight gradient share.
#pragma once

#include "geometry.h"

namespace lance {

// Sizes of one call. `rank` is the channel mode of the core as it is contracted: the core's own rank, or, where a group
// has fewer channels than that, the channels of x, the core having been expanded along them.
struct Problem {
  int64_t samples;  // of grad_output
  int64_t kept;     // entries of the core's batch mode
  int64_t outputs;
  int64_t groups;
  int64_t group_channels;
  int64_t rank;
  bool channels_expanded;
  Sizes input;       // spatial sizes of x
  Sizes taps;        // kernel, spatial mode by spatial mode
  Sizes core_ranks;  // of the core's spatial modes
  Sizes positions;   // spatial sizes of grad_output
  int64_t tap_count;
  int64_t rank_count;

  // Channels the sums of an output have: all ranks, or its group's channels.
  int64_t sum_channels() const {
    return channels_expanded ? group_channels : rank;
  }
};

// Where a group has one channel, a core of few channels saves nothing in the products with grad_output. This way makes
// the image of a few channels of one sample at a time from the core, in cache, and correlates grad_output with it.
template <typename T>
class Depthwise {
 public:
  // One channel a group, two spatial modes, both with a factor, and the batch mode kept.
  static bool fits(const Problem& problem, const Factors& factors);

  // `core` is (samples, channels, ranks) in T.
  Depthwise(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
            const Geometry& geometry);

  // Vector operations, about.
  double cost() const;
  void run(Tensor& grad_weight) const;

 private:
  std::vector<Mode<T>> modes(int64_t channels) const;
  void run_channels(int64_t first, int64_t count, Tensor& grad_weight) const;

  const Problem& problem_;
  const Tensor& grad_;
  Tensor core_;
  Matrix<T> height_;
  Matrix<T> width_;                  // columns of one stride phase next to each other
  std::optional<Matrix<T>> merged_;  // both as one
  Sizes offsets_;                    // of each tap in the image
  int64_t image_row_;
  int64_t image_;
  int64_t block_;
  bool in_place_;
};

}  // namespace lance
