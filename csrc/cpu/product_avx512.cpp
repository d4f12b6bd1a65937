// For x86-64 with AVX-512 (F, BW, DQ, VL): vectors of 64 bytes, 32 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "product.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif

#if defined(__GNUC__) && !defined(__clang__)
// Intrinsics of GCC 12 start from a value they never read.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define LANCE_INSTRUCTION_SET avx512
#define LANCE_VECTOR_BYTES 64
#define LANCE_TILE_ROWS 12

#include "product_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
