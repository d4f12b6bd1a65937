// The elementwise routines of one instruction set. Included once by elementwise_generic.cpp, elementwise_avx2.cpp and
// elementwise_avx512.cpp, each of which has set the compiler's target, LANCE_INSTRUCTION_SET (the namespace) and
// LANCE_VECTOR_BYTES. As in product_kernel.h, nothing here may instantiate a template of the standard library. The
// loops are written so that the compiler vectorises them.

namespace lance::LANCE_INSTRUCTION_SET {
namespace {

template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
  static constexpr type magnitude = 0x7fffffff;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
  static constexpr type magnitude = 0x7fffffffffffffff;
};

// Comparisons of eight neighbours as bits. `above` is x > bound, `not_at_most` is !(x <= bound), so true for NaN,
// `not_at_least` is !(x >= bound).
enum class Compare { above, not_at_most, not_at_least };

template <Compare how, typename T>
inline bool compare_one(T x, T bound) {
  return how == Compare::above ? x > bound : how == Compare::not_at_most ? !(x <= bound) : !(x >= bound);
}

template <Compare how, typename T>
inline unsigned compare_eight(const T* x, T bound) {
  unsigned bits = 0;
  for (int lane = 0; lane < 8; ++lane) {
    bits |= static_cast<unsigned>(compare_one<how>(x[lane], bound)) << lane;
  }
  return bits;
}

#if LANCE_VECTOR_BYTES >= 32
template <Compare how>
constexpr int predicate = how == Compare::above         ? _CMP_GT_OQ
                          : how == Compare::not_at_most ? _CMP_NLE_UQ
                                                        : _CMP_NGE_UQ;

template <Compare how>
inline unsigned compare_eight(const float* x, float bound) {
  const __m256 compared = _mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_set1_ps(bound), predicate<how>);
  return static_cast<unsigned>(_mm256_movemask_ps(compared));
}
#endif

template <typename T>
inline T activated(const Piecewise<T>& function, T x) {
  switch (function.kind) {
    case Piecewise<T>::relu:
      return x < 0 ? T(0) : x;
    case Piecewise<T>::clamp: {
      const T raised = x < function.low ? function.low : x;
      return raised > function.high ? function.high : raised;
    }
    default:
      return x * (x > 0 ? T(1) : function.slope);
  }
}

template <typename T>
inline unsigned derivative_bits(const Piecewise<T>& function, const T* x) {
  switch (function.kind) {
    case Piecewise<T>::relu:
      return compare_eight<Compare::not_at_most>(x, T(0));
    case Piecewise<T>::clamp:
      return compare_eight<Compare::not_at_most>(x, function.low) &
             compare_eight<Compare::not_at_least>(x, function.high);
    default:
      return compare_eight<Compare::above>(x, T(0));
  }
}

template <typename T, typename Piecewise<T>::Kind kind>
void activate_kind(Piecewise<T> function, const T* x, T* y, uint8_t* mask, int64_t count) {
  function.kind = kind;
  int64_t index = 0;
  for (; index + 8 <= count; index += 8) {
    mask[index / 8] = static_cast<uint8_t>(derivative_bits(function, x + index));
    for (int lane = 0; lane < 8; ++lane) {
      y[index + lane] = activated(function, x[index + lane]);
    }
  }
  if (index < count) {
    T rest[8] = {};
    for (int64_t lane = 0; lane < count - index; ++lane) {
      rest[lane] = x[index + lane];
    }
    const unsigned used = (1u << (count - index)) - 1;
    mask[index / 8] = static_cast<uint8_t>(derivative_bits(function, rest) & used);
    for (int64_t lane = 0; lane < count - index; ++lane) {
      y[index + lane] = activated(function, rest[lane]);
    }
  }
}

template <typename T>
void activate(const Piecewise<T>& function, const T* x, T* y, uint8_t* mask, int64_t count) {
  switch (function.kind) {
    case Piecewise<T>::relu:
      return activate_kind<T, Piecewise<T>::relu>(function, x, y, mask, count);
    case Piecewise<T>::clamp:
      return activate_kind<T, Piecewise<T>::clamp>(function, x, y, mask, count);
    default:
      return activate_kind<T, Piecewise<T>::leaky>(function, x, y, mask, count);
  }
}

template <bool scaled, typename T>
inline void select_eight(const T* from, unsigned bits, T slope, T* to) {
  for (int lane = 0; lane < 8; ++lane) {
    to[lane] = bits >> lane & 1 ? from[lane] : scaled ? from[lane] * slope : T(0);
  }
}

#if LANCE_VECTOR_BYTES >= 32
template <bool scaled>
inline void select_eight(const float* from, unsigned bits, float slope, float* to) {
  const __m256 value = _mm256_loadu_ps(from);
  const __m256 other = scaled ? _mm256_mul_ps(value, _mm256_set1_ps(slope)) : _mm256_setzero_ps();
#if LANCE_VECTOR_BYTES == 64
  _mm256_storeu_ps(to, _mm256_mask_blend_ps(static_cast<__mmask8>(bits), other, value));
#else
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  _mm256_storeu_ps(to, _mm256_blendv_ps(other, value, _mm256_castsi256_ps(set)));
#endif
}
#endif

template <bool scaled, typename T>
void select_all(const T* from, const uint8_t* mask, T slope, T* to, int64_t count) {
  int64_t index = 0;
  for (; index + 8 <= count; index += 8) {
    select_eight<scaled>(from + index, static_cast<unsigned>(mask[index / 8]), slope, to + index);
  }
  for (; index < count; ++index) {
    to[index] = mask[index / 8] >> index % 8 & 1 ? from[index] : scaled ? from[index] * slope : T(0);
  }
}

template <typename T>
void select(const T* from, const uint8_t* mask, bool scaled, T slope, T* to, int64_t count) {
  if (scaled) {
    select_all<true>(from, mask, slope, to, count);
  } else {
    select_all<false>(from, mask, slope, to, count);
  }
}

template <typename T>
void affine(const T* from, T scale, T shift, T* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = from[index] * scale + shift;
  }
}

template <typename T>
void affine_each(const T* from, const T* scale, const T* shift, T* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = from[index] * scale[index] + shift[index];
  }
}

template <typename T>
void multiply(const T* from, T first, T second, T* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = from[index] * first * second;
  }
}

template <typename T>
void multiply_each(const T* from, const T* first, const T* second, T* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = from[index] * first[index] * second[index];
  }
}

// exp(x) to a few units in the last place of float, for the derivatives' 8 bits; x is at most 88 in magnitude.
inline float exponential(float x) {
  // x = n log 2 + r, |r| at most log(2) / 2; the magic number rounds to an integer.
  const float rounder = 12582912.0f;
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t power = static_cast<int32_t>(n) + 127;
  return p * __builtin_bit_cast(float, power << 23);
}

inline float bounded(float x, float limit) {
  const float raised = x < -limit ? -limit : x;
  return raised > limit ? limit : raised;
}

inline float logistic(float x) {
  return 1.0f / (1.0f + exponential(-x));
}

// Abramowitz and Stegun 7.1.26, within 1.5e-7 of erf; `tail` is exp(-x^2).
inline float error_function(float x, float tail) {
  const float magnitude = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * magnitude);
  const float polynomial =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float value = 1.0f - polynomial * tail;
  return x < 0 ? -value : value;
}

// The kinks of the piecewise ones lie where they lie in T.
template <DerivativeGrid::Kind kind, typename T>
inline float derivative(T value) {
  const float x = static_cast<float>(value);
  if constexpr (kind == DerivativeGrid::gelu) {
    const float v = bounded(x, 9.0f);
    const float tail = exponential(-0.5f * v * v);
    return 0.5f + 0.5f * error_function(v * 0.70710678f, tail) + v * tail * 0.39894228f;
  } else if constexpr (kind == DerivativeGrid::gelu_tanh) {
    const float v = bounded(x, 9.0f);
    const float u = 0.79788456f * (v + 0.044715f * v * v * v);
    const float t = 2.0f * logistic(bounded(2.0f * u, 80.0f)) - 1.0f;
    return 0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * v * v);
  } else if constexpr (kind == DerivativeGrid::silu || kind == DerivativeGrid::quick_gelu) {
    const float v = bounded(kind == DerivativeGrid::silu ? x : 1.702f * x, 80.0f);
    const float s = logistic(v);
    return s * (1.0f + v * (1.0f - s));
  } else if constexpr (kind == DerivativeGrid::hardswish) {
    const float inside = value < T(3) ? x * (1.0f / 3.0f) + 0.5f : 1.0f;
    return value <= T(-3) ? 0.0f : inside;
  } else if constexpr (kind == DerivativeGrid::sigmoid) {
    const float s = logistic(bounded(x, 80.0f));
    return s * (1.0f - s);
  } else if constexpr (kind == DerivativeGrid::tanh) {
    const float t = 2.0f * logistic(bounded(2.0f * x, 80.0f)) - 1.0f;
    return 1.0f - t * t;
  } else {
    const float inside = value < T(3) ? 1.0f / 6.0f : 0.0f;
    return value > T(-3) ? inside : 0.0f;
  }
}

template <DerivativeGrid::Kind kind, typename T>
void codes_of(const DerivativeGrid& grid, const T* x, uint8_t* codes, int64_t count) {
  const float steps = static_cast<float>(grid.steps);
  const float zero = static_cast<float>(grid.zero);
  const float top = static_cast<float>(grid.missing - 1);
  const int32_t missing = grid.missing;
  for (int64_t index = 0; index < count; ++index) {
    const T value = x[index];
    const float rounder = 12582912.0f;
    const float scaled = derivative<kind>(value) * steps;
    const float rounded = (scaled + rounder) - rounder + zero;
    const float raised = rounded > 0.0f ? rounded : 0.0f;
    const int32_t code = static_cast<int32_t>(raised < top ? raised : top);
    const bool marks = kind != DerivativeGrid::hardsigmoid && !(value == value);
    codes[index] = static_cast<uint8_t>(marks ? missing : code);
  }
}

template <typename T>
void derivative_codes(const DerivativeGrid& grid, const T* x, uint8_t* codes, int64_t count) {
  switch (grid.kind) {
    case DerivativeGrid::gelu:
      return codes_of<DerivativeGrid::gelu>(grid, x, codes, count);
    case DerivativeGrid::gelu_tanh:
      return codes_of<DerivativeGrid::gelu_tanh>(grid, x, codes, count);
    case DerivativeGrid::silu:
      return codes_of<DerivativeGrid::silu>(grid, x, codes, count);
    case DerivativeGrid::quick_gelu:
      return codes_of<DerivativeGrid::quick_gelu>(grid, x, codes, count);
    case DerivativeGrid::hardswish:
      return codes_of<DerivativeGrid::hardswish>(grid, x, codes, count);
    case DerivativeGrid::sigmoid:
      return codes_of<DerivativeGrid::sigmoid>(grid, x, codes, count);
    case DerivativeGrid::tanh:
      return codes_of<DerivativeGrid::tanh>(grid, x, codes, count);
    default:
      return codes_of<DerivativeGrid::hardsigmoid>(grid, x, codes, count);
  }
}

template <typename T>
void apply_codes(const DerivativeGrid& grid, const T* from, const uint8_t* codes, T* to, int64_t count) {
  const T steps = static_cast<T>(grid.steps);
  const int32_t zero = grid.zero;
  const int32_t missing = grid.missing;
  for (int64_t index = 0; index < count; ++index) {
    const int32_t code = codes[index];
    const T value = static_cast<T>(code - zero) / steps;
    to[index] = from[index] * (code == missing ? static_cast<T>(__builtin_nanf("")) : value);
  }
}

// Magnitudes compare as integers, NaN above infinity.
template <typename T>
inline typename BitsOf<T>::type magnitude(T value) {
  return __builtin_bit_cast(typename BitsOf<T>::type, value) & BitsOf<T>::magnitude;
}

template <typename T>
T deviation(const T* x, T center, int64_t count) {
  typename BitsOf<T>::type largest = 0;
  for (int64_t index = 0; index < count; ++index) {
    const auto bits = magnitude(x[index] - center);
    largest = bits > largest ? bits : largest;
  }
  return __builtin_bit_cast(T, largest);
}

template <typename T>
void deviation_each(const T* x, const T* center, T* largest, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    const auto bits = magnitude(x[index] - center[index]);
    const auto before = magnitude(largest[index]);
    largest[index] = __builtin_bit_cast(T, bits > before ? bits : before);
  }
}

// In steps, rounded to the nearest; NaN and what does not fit becomes 0 or the end.
template <typename T>
inline int8_t code_of(T deviation, T inverse) {
  const T scaled = deviation * inverse;
  const T raised = scaled > T(-127) ? scaled : T(-127);
  const T fitted = raised < T(127) ? raised : T(127);
  const float rounder = 12582912.0f;
  return static_cast<int8_t>(static_cast<int32_t>((static_cast<float>(fitted) + rounder) - rounder));
}

template <typename T>
void quantize(const T* x, T center, T inverse, int8_t* codes, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    codes[index] = code_of(x[index] - center, inverse);
  }
}

template <typename T>
void quantize_each(const T* x, const T* center, const T* inverse, int8_t* codes, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    codes[index] = code_of(x[index] - center[index], inverse[index]);
  }
}

template <typename T>
void dequantize(const int8_t* codes, T step, T* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = static_cast<T>(codes[index]) * step;
  }
}

template <typename T>
void dequantize_each(const int8_t* codes, const T* step, T* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = static_cast<T>(codes[index]) * step[index];
  }
}

template <typename T>
inline void keep_larger_apart(const T* values, int64_t stride, uint8_t offset, T* best, uint8_t* offsets,
                              int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    const T value = values[index * stride];
    const T before = best[index];
    const bool better = !(value <= before) && !(before != before && value == value);
    best[index] = better ? value : before;
    offsets[index] = better ? offset : offsets[index];
  }
}

// With the stride known the compiler loads neighbours and shuffles.
template <typename T>
void keep_larger(const T* values, int64_t stride, uint8_t offset, T* best, uint8_t* offsets, int64_t count) {
  if (stride == 1) {
    keep_larger_apart(values, 1, offset, best, offsets, count);
  } else if (stride == 2) {
    keep_larger_apart(values, 2, offset, best, offsets, count);
  } else {
    keep_larger_apart(values, stride, offset, best, offsets, count);
  }
}

template <typename T>
constexpr ElementwiseOf<T> routines_of() {
  ElementwiseOf<T> table{};
  table.activate = activate<T>;
  table.select = select<T>;
  table.affine = affine<T>;
  table.affine_each = affine_each<T>;
  table.multiply = multiply<T>;
  table.multiply_each = multiply_each<T>;
  table.derivative_codes = derivative_codes<T>;
  table.apply_codes = apply_codes<T>;
  table.deviation = deviation<T>;
  table.deviation_each = deviation_each<T>;
  table.quantize = quantize<T>;
  table.quantize_each = quantize_each<T>;
  table.dequantize = dequantize<T>;
  table.dequantize_each = dequantize_each<T>;
  table.keep_larger = keep_larger<T>;
  return table;
}

}  // namespace

extern const Elementwise elementwise_table;
constinit const Elementwise elementwise_table{routines_of<float>(), routines_of<double>()};

}  // namespace lance::LANCE_INSTRUCTION_SET
