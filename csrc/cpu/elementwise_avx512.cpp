// For x86-64 with AVX-512 (F, BW, DQ, VL): vectors of 64 bytes, 32 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "elementwise.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif

#define LANCE_INSTRUCTION_SET avx512
#define LANCE_VECTOR_BYTES 64

#include "elementwise_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
