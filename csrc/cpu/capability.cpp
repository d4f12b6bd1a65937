#include "capability.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace lance {
namespace {

Capability supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::generic;
#else
  return Capability::generic;
#endif
}

Capability allowed() {
  const char* value = std::getenv("LANCE_CPU_CAPABILITY");
  const std::string name = value ? value : "";
  return name == "generic" ? Capability::generic : name == "avx2" ? Capability::avx2 : Capability::avx512;
}

}  // namespace

Capability capability() {
  static const Capability chosen = std::min(supported(), allowed());
  return chosen;
}

}  // namespace lance

extern "C" __attribute__((visibility("default"))) const char* lance_cpu_capability() {
  switch (lance::capability()) {
    case lance::Capability::avx512:
      return "avx512";
    case lance::Capability::avx2:
      return "avx2";
    default:
      return "generic";
  }
}
