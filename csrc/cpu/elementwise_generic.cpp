// For any processor: vectors of 16 bytes, which every compiler target here has (SSE2, NEON).
#include "elementwise.h"

#define LANCE_INSTRUCTION_SET generic
#define LANCE_VECTOR_BYTES 16

#include "elementwise_kernel.h"
