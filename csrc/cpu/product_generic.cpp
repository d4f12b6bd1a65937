// For any processor: vectors of 16 bytes, which every compiler target here has (SSE2, NEON).
#include <torch/headeronly/util/Half.h>

#include "product.h"

#define LANCE_INSTRUCTION_SET generic
#define LANCE_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LANCE_TILE_ROWS 12
#else
#define LANCE_TILE_ROWS 6
#endif

#include "product_kernel.h"
