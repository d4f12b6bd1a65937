// For x86-64 with AVX2, FMA and F16C: vectors of 32 bytes, 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "elementwise.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LANCE_INSTRUCTION_SET avx2
#define LANCE_VECTOR_BYTES 32

#include "elementwise_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
