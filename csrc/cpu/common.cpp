#include "common.h"

namespace lance {

void check_factors(const char* operation, const char* argument, const Tensor& tensor, const Factors& factors,
                   int64_t side) {
  check_floating(operation, argument, tensor);
  const Sizes sizes = sizes_of(tensor);
  if (factors.size() != sizes.size()) {
    check(false, "lance::", operation, ": factors has ", factors.size(), " entries; expected one a mode of ", argument,
          ", whose shape is ", shape_string(sizes));
  }
  for (size_t mode = 0; mode < factors.size(); ++mode) {
    if (!factors[mode].has_value()) {
      continue;
    }
    const Tensor& factor = *factors[mode];
    const std::string name = "factors[" + std::to_string(mode) + "]";
    check_floating(operation, name, factor);
    check(factor.dim() == 2 && factor.size(1) > 0, "lance::", operation, ": ", name, " has shape ",
          shape_string(factor), "; expected (size, rank) with rank >= 1");
    check(factor.size(side) == sizes[mode], "lance::", operation, ": ", name, " has shape ", shape_string(factor),
          "; expected its ", side ? "rank" : "size", " to be that of mode ", mode, " of ", argument,
          ", whose shape is ", shape_string(sizes));
    check(factor.is_cpu(), "lance::", operation, ": ", name, " is not on cpu; expected cpu, where ", argument, " is");
  }
}

void check_same(const char* operation, const Tensor& first, const char* argument, const Tensor& tensor) {
  check(tensor.scalar_type() == first.scalar_type() && tensor.is_cpu() == first.is_cpu(), "lance::", operation, ": ",
        argument, " is ", dtype_name(tensor.scalar_type()), tensor.is_cpu() ? " on cpu" : "", "; expected ",
        dtype_name(first.scalar_type()), first.is_cpu() ? " on cpu" : "", ", as the first argument");
}

}  // namespace lance
