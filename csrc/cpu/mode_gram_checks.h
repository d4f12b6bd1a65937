// Argument checks of the Gram operators, for every device; the words are those of lance_kernels/ops/mode_gram.py.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace lance {

inline int64_t check_mode(const char* operation, const Tensor& x, int64_t mode) {
  check_floating(operation, "x", x);
  const int64_t modes = x.dim();
  check(-modes <= mode && mode < modes, "lance::", operation, ": mode is ", mode, "; expected one of the ", modes,
        " modes of x, whose shape is ", shape_string(x));
  return mode < 0 ? mode + modes : mode;
}

inline Sizes check_grams(const std::vector<Tensor>& grams, const Tensor& x, const Sizes& modes) {
  check(grams.size() == modes.size(), "lance::mode_grams_: grams has ", grams.size(),
        " entries; expected one for each of modes ", list_string(modes));
  Sizes wrapped;
  for (const int64_t mode : modes) {
    wrapped.push_back(check_mode("mode_grams_", x, mode));
  }
  for (const int64_t mode : wrapped) {
    check(std::count(wrapped.begin(), wrapped.end(), mode) == 1, "lance::mode_grams_: modes ", list_string(modes),
          " names a mode twice");
  }
  const bool wide = x.scalar_type() == ScalarType::Double;
  for (size_t index = 0; index < grams.size(); ++index) {
    const Tensor& gram = grams[index];
    const int64_t size = x.size(wrapped[index]);
    check(gram.dim() == 2 && gram.size(0) == size && gram.size(1) == size, "lance::mode_grams_: grams[", index,
          "] has shape ", shape_string(gram), "; expected (", size, ", ", size, ") for mode ", wrapped[index],
          " of x, whose shape is ", shape_string(x));
    const ScalarType dtype = gram.scalar_type();
    check(dtype == ScalarType::Double || (dtype == ScalarType::Float && !wide), "lance::mode_grams_: grams[", index,
          "] has dtype ", dtype_name(dtype), "; expected ", wide ? "" : "torch.float32 or ", "torch.float64 for x of ",
          dtype_name(x.scalar_type()));
    const char* device = x.is_cpu() ? "cpu" : "cuda";
    check(gram.is_cpu() == x.is_cpu() && gram.get_device_index() == x.get_device_index(), "lance::mode_grams_: grams[",
          index, "] is not on ", device, "; expected ", device, ", where x is");
    check_not_expanded("mode_grams_", "grams[" + std::to_string(index) + "]", gram);
  }
  return wrapped;
}

}  // namespace lance
