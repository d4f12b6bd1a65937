// lance_kernels._build_info: what the operator library beside it was built with.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#define LANCE_STRING_OF(value) #value
#define LANCE_STRING(value) LANCE_STRING_OF(value)

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "What the operator library beside this module was built with.";
#if defined(__clang__)
  module.attr("compiler") = "clang " __clang_version__;
#else
  module.attr("compiler") = "gcc " __VERSION__;
#endif
  module.attr("cxx_standard") = __cplusplus;
  module.attr("built_with_torch") = TORCH_VERSION;
  // 0x020b000000000000 is PyTorch 2.11.0.
  module.attr("minimum_torch") =
      std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff);
}
