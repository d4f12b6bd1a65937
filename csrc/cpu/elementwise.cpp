#include "elementwise.h"

#include "capability.h"

namespace lance {

namespace generic {
extern const Elementwise elementwise_table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Elementwise elementwise_table;
}
namespace avx512 {
extern const Elementwise elementwise_table;
}
#endif

const Elementwise& elementwise() {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::avx512:
      return avx512::elementwise_table;
    case Capability::avx2:
      return avx2::elementwise_table;
    default:
      return generic::elementwise_table;
  }
#else
  return generic::elementwise_table;
#endif
}

}  // namespace lance
