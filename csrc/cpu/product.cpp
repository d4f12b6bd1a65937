#include "product.h"

#include "capability.h"

namespace lance {

namespace generic {
extern const Routines table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Routines table;
}
namespace avx512 {
extern const Routines table;
}
#endif

const Routines& routines() {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::avx512:
      return avx512::table;
    case Capability::avx2:
      return avx2::table;
    default:
      return generic::table;
  }
#else
  return generic::table;
#endif
}

}  // namespace lance
