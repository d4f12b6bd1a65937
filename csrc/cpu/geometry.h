// What a convolution is, apart from its tensors, and its padding as a look-up of factor rows.
#pragma once

#include <utility>

#include "chain.h"

namespace lance {

struct Geometry {
  Sizes stride;
  Sizes padding;  // one number a spatial mode, or two (before, after)
  Sizes dilation;
  int64_t groups = 1;
  std::string padding_mode;

  // Rows added before and behind a spatial mode.
  std::pair<int64_t, int64_t> pads(size_t mode) const {
    return padding.size() == stride.size() ? std::pair(padding[mode], padding[mode])
                                           : std::pair(padding[2 * mode], padding[2 * mode + 1]);
  }
};

// Refuses a geometry that does not fit; returns the size of the convolution's output.
Sizes check_geometry(const char* operation, const Sizes& input_size, const Sizes& weight_size,
                     const Geometry& geometry);

// Row of the unpadded mode that row `index` (from -before) of the padded one shows; -1 for a row of zeros.
int64_t padded_row(int64_t index, int64_t size, const std::string& padding_mode);

// (outputs, taps * rank): column (i, k) of row h is factor[padded_row(stride h + dilation i - before), k], the factor
// as each kernel tap meets it. Without a factor the rank is `size` and the factor the identity.
template <typename T>
Matrix<T> shifted(const std::optional<Tensor>& factor, int64_t size, int64_t outputs, int64_t taps,
                  const Geometry& geometry, size_t mode);

// (rank, before + size + after): the factor as it expands to the padded mode, the identity for none.
template <typename T>
Matrix<T> expanding_padded(const std::optional<Tensor>& factor, int64_t size, const Geometry& geometry, size_t mode);

}  // namespace lance
