// The routines of one instruction set. Included once by product_generic.cpp, product_avx2.cpp and product_avx512.cpp,
// each of which has set the compiler's target, LANCE_INSTRUCTION_SET (the namespace), LANCE_VECTOR_BYTES and
// LANCE_TILE_ROWS. Nothing here may instantiate a template of the standard library: the linker could keep that copy,
// compiled for this instruction set, for the whole library.

namespace lance::LANCE_INSTRUCTION_SET {
namespace {

typedef float FloatVector __attribute__((vector_size(LANCE_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(LANCE_VECTOR_BYTES)));

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};

template <typename T>
constexpr int64_t lanes_of = LANCE_VECTOR_BYTES / sizeof(T);

template <typename T>
inline typename VectorOf<T>::type load(const T* from) {
  typename VectorOf<T>::type value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
inline void store(T* to, typename VectorOf<T>::type value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// The first `count` lanes, the others zero; nothing past them is touched.
#if LANCE_VECTOR_BYTES == 64
inline FloatVector load_part(const float* from, int64_t count) {
  return (FloatVector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
inline DoubleVector load_part(const double* from, int64_t count) {
  return (DoubleVector)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
inline void store_part(float* to, FloatVector value, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
}
inline void store_part(double* to, DoubleVector value, int64_t count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)value);
}
#else
#if LANCE_VECTOR_BYTES == 32
inline FloatVector load_part(const float* from, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  return (FloatVector)_mm256_maskload_ps(from, mask);
}
inline DoubleVector load_part(const double* from, int64_t count) {
  const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  return (DoubleVector)_mm256_maskload_pd(from, mask);
}
#else
template <typename T>
inline typename VectorOf<T>::type load_part(const T* from, int64_t count) {
  typename VectorOf<T>::type value{};
  for (int64_t lane = 0; lane < count; ++lane) {
    value[lane] = from[lane];
  }
  return value;
}
#endif
template <typename T>
inline void store_part(T* to, typename VectorOf<T>::type value, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) {
    to[lane] = value[lane];
  }
}
#endif

// Adds up one tile of c: Rows rows of Vectors vectors, the last of them `last` lanes wide where Part. The tile stays in
// registers over the whole depth; each vector of b that is loaded meets Rows scalars of a. UnitRow: a_row is 1.
template <typename T, int Rows, int Vectors, bool UnitRow, bool Part>
void tile(const Product<T>& p, const T* a, const T* b, T* c, int64_t last) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t lanes = lanes_of<T>;
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const T* at = c + row * p.c_row + v * lanes;
      sum[row][v] = !p.accumulate ? Vector{} : Part && v == Vectors - 1 ? load_part(at, last) : load(at);
    }
  }
  for (int64_t outer = 0; outer < p.outer_depth; ++outer) {
    const T* a_at = a + outer * p.a_outer;
    const T* b_at = b + outer * p.b_outer;
    for (int64_t inner = 0; inner < p.inner_depth; ++inner) {
      Vector right[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        right[v] = Part && v == Vectors - 1 ? load_part(b_at + v * lanes, last) : load(b_at + v * lanes);
        __builtin_prefetch(b_at + (Vectors + v) * lanes);  // the next column panel
      }
#pragma GCC unroll 16
      for (int row = 0; row < Rows; ++row) {
        const T left = a_at[UnitRow ? row : row * p.a_row];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          sum[row][v] += left * right[v];
        }
      }
      a_at += p.a_inner;
      b_at += p.b_inner;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      T* at = c + row * p.c_row + v * lanes;
      if (Part && v == Vectors - 1) {
        store_part(at, sum[row][v], last);
      } else {
        store(at, sum[row][v]);
      }
    }
  }
}

template <typename T>
using Tile = void (*)(const Product<T>&, const T*, const T*, T*, int64_t);

template <typename T, int Vectors, bool UnitRow, bool Part, int Rows = 1>
inline Tile<T> tile_of_rows(int64_t rows) {
  // Four vectors are for the few rows that would else leave the multipliers waiting.
  constexpr int most = Vectors == 4 ? LANCE_TILE_ROWS / 4 : LANCE_TILE_ROWS;
  if constexpr (Rows >= most) {
    return tile<T, most, Vectors, UnitRow, Part>;
  } else {
    return rows == Rows ? tile<T, Rows, Vectors, UnitRow, Part>
                        : tile_of_rows<T, Vectors, UnitRow, Part, Rows + 1>(rows);
  }
}

template <typename T, int Vectors>
inline Tile<T> choose_tile(int64_t rows, bool unit_row, bool part) {
  if (unit_row) {
    return part ? tile_of_rows<T, Vectors, true, true>(rows) : tile_of_rows<T, Vectors, true, false>(rows);
  }
  return part ? tile_of_rows<T, Vectors, false, true>(rows) : tile_of_rows<T, Vectors, false, false>(rows);
}

// Rows are cut into panels of equal height, columns into panels of one, two or four vectors. A column panel of b stays
// in the first or second cache while every row panel meets it; where there is more than one row panel, the depth is cut
// so that it does.
template <typename T>
void product(const Product<T>& p) {
  constexpr int64_t lanes = lanes_of<T>;
  constexpr int64_t cached_depth = 512;
  if (p.rows <= 0 || p.columns <= 0) {
    return;
  }
  const int64_t panels = (p.rows + LANCE_TILE_ROWS - 1) / LANCE_TILE_ROWS;
  if (panels > 1 && p.outer_depth == 1 && p.inner_depth > 2 * cached_depth) {
    Product<T> part = p;
    for (int64_t begin = 0; begin < p.inner_depth; begin += cached_depth) {
      part.inner_depth = p.inner_depth - begin < cached_depth ? p.inner_depth - begin : cached_depth;
      part.a = p.a + begin * p.a_inner;
      part.b = p.b + begin * p.b_inner;
      product(part);
      part.accumulate = true;
    }
    return;
  }
  const int64_t height = (p.rows + panels - 1) / panels;
  const int64_t full_panels = p.rows - panels * (height - 1);  // the others are one row lower
  const int64_t vectors = height <= LANCE_TILE_ROWS / 4 && p.columns > 2 * lanes ? 4 : 2;
  const bool unit_row = p.a_row == 1;
  for (int64_t column = 0; column < p.columns;) {
    const int64_t left = p.columns - column;
    const int64_t wide = left > 2 * lanes ? vectors : left > lanes ? 2 : 1;
    const int64_t width = left < wide * lanes ? left : wide * lanes;
    const bool part = width < wide * lanes;
    // With four vectors the rest may fill only three: two and then one are taken instead.
    const int64_t used = wide == 4 && part ? 2 : wide;
    const int64_t taken = used == wide ? width : used * lanes;
    const bool cut = taken < used * lanes;
    const int64_t last = taken - (used - 1) * lanes;
    int64_t row = 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t rows = panel < full_panels ? height : height - 1;
      const Tile<T> run = used == 4   ? choose_tile<T, 4>(rows, unit_row, cut)
                          : used == 2 ? choose_tile<T, 2>(rows, unit_row, cut)
                                      : choose_tile<T, 1>(rows, unit_row, cut);
      run(p, p.a + row * p.a_row, p.b + column, p.c + row * p.c_row + column, last);
      row += rows;
    }
    column += taken;
  }
}

// Every vector of grad that is loaded meets the vectors of image that each tap sees; the sums stay in registers.
template <typename T, int Taps>
void correlate_taps(const Correlation<T>& c) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t lanes = lanes_of<T>;
  Vector sum[Taps];
#pragma GCC unroll 9
  for (int tap = 0; tap < Taps; ++tap) {
    sum[tap] = load(c.sums + tap * lanes);
  }
  const int64_t whole = c.columns / lanes * lanes;
  const int64_t rest = c.columns - whole;
  for (int64_t row = 0; row < c.rows; ++row) {
    const T* grad = c.grad + row * c.grad_row;
    const T* image = c.image + row * c.image_row;
    for (int64_t column = 0; column < whole; column += lanes) {
      const Vector value = load(grad + column);
#pragma GCC unroll 9
      for (int tap = 0; tap < Taps; ++tap) {
        sum[tap] += value * load(image + column + c.offsets[tap]);
      }
    }
    if (rest) {
      const Vector value = load_part(grad + whole, rest);
#pragma GCC unroll 9
      for (int tap = 0; tap < Taps; ++tap) {
        sum[tap] += value * load_part(image + whole + c.offsets[tap], rest);
      }
    }
  }
#pragma GCC unroll 9
  for (int tap = 0; tap < Taps; ++tap) {
    store(c.sums + tap * lanes, sum[tap]);
  }
}

template <typename T>
void correlate(const Correlation<T>& c) {
  switch (c.taps) {
    case 1:
      return correlate_taps<T, 1>(c);
    case 2:
      return correlate_taps<T, 2>(c);
    case 3:
      return correlate_taps<T, 3>(c);
    case 4:
      return correlate_taps<T, 4>(c);
    case 5:
      return correlate_taps<T, 5>(c);
    case 6:
      return correlate_taps<T, 6>(c);
    case 7:
      return correlate_taps<T, 7>(c);
    case 8:
      return correlate_taps<T, 8>(c);
    default:
      return correlate_taps<T, 9>(c);
  }
}

// A bfloat16 is the upper half of a float.
void widen_bfloat16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    const uint32_t bits = static_cast<uint32_t>(from[index]) << 16;
    __builtin_memcpy(to + index, &bits, sizeof(bits));
  }
}

// To nearest, ties to even; NaN stays NaN.
void narrow_bfloat16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + index, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[index] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

#if LANCE_VECTOR_BYTES > 16
void widen_half(const uint16_t* from, float* to, int64_t count) {
  int64_t index = 0;
  for (; index + 8 <= count; index += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + index));
    _mm256_storeu_ps(to + index, _mm256_cvtph_ps(bits));
  }
  for (; index < count; ++index) {
    to[index] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[index])));
  }
}

void narrow_half(const float* from, uint16_t* to, int64_t count) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t index = 0;
  for (; index + 8 <= count; index += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + index), nearest);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + index), bits);
  }
  for (; index < count; ++index) {
    to[index] = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(from[index]), nearest)));
  }
}
#else
void widen_half(const uint16_t* from, float* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[index]);
  }
}

void narrow_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    to[index] = torch::headeronly::detail::fp16_ieee_from_fp32_value(from[index]);
  }
}
#endif

#if LANCE_VECTOR_BYTES == 64
// Sixteen by sixteen in registers: pairs, then pairs of pairs within each quarter of a vector, then the quarters.
inline void transpose_block(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                            int64_t to_row) {
  __m512 line[16];
  __m512 part[16];
  const __mmask16 wanted = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    line[i] = _mm512_maskz_loadu_ps(i < rows ? wanted : 0, i < rows ? from + i * from_row : from);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    part[i] = _mm512_unpacklo_ps(line[i], line[i + 1]);
    part[i + 1] = _mm512_unpackhi_ps(line[i], line[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto low = [&](int a, int b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(part[a]), _mm512_castps_pd(part[b])));
    };
    const auto high = [&](int a, int b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(part[a]), _mm512_castps_pd(part[b])));
    };
    line[i] = low(i, i + 2);
    line[i + 1] = high(i, i + 2);
    line[i + 2] = low(i + 1, i + 3);
    line[i + 3] = high(i + 1, i + 3);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    part[i] = _mm512_shuffle_f32x4(line[i], line[i + 4], 0x88);
    part[i + 4] = _mm512_shuffle_f32x4(line[i], line[i + 4], 0xdd);
    part[i + 8] = _mm512_shuffle_f32x4(line[i + 8], line[i + 12], 0x88);
    part[i + 12] = _mm512_shuffle_f32x4(line[i + 8], line[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    line[i] = _mm512_shuffle_f32x4(part[i], part[i + 8], 0x88);
    line[i + 8] = _mm512_shuffle_f32x4(part[i], part[i + 8], 0xdd);
    line[i + 4] = _mm512_shuffle_f32x4(part[i + 4], part[i + 12], 0x88);
    line[i + 12] = _mm512_shuffle_f32x4(part[i + 4], part[i + 12], 0xdd);
  }
  const __mmask16 kept = static_cast<__mmask16>((1u << rows) - 1);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    if (j < columns) {
      _mm512_mask_storeu_ps(to + j * to_row, kept, line[j]);
    }
  }
}
#else
inline void transpose_block(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                            int64_t to_row) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      to[j * to_row + i] = from[i * from_row + j];
    }
  }
}
#endif

void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t j = 0; j < columns; j += 16) {
    for (int64_t i = 0; i < rows; i += 16) {
      const int64_t high = rows - i < 16 ? rows - i : 16;
      const int64_t wide = columns - j < 16 ? columns - j : 16;
      transpose_block(from + i * from_row + j, from_row, high, wide, to + j * to_row + i, to_row);
    }
  }
}

}  // namespace

extern const Routines table;
const Routines table = {
    LANCE_VECTOR_BYTES, product<float>, product<double>, correlate<float>, correlate<double>,
    widen_bfloat16,     widen_half,     narrow_bfloat16, narrow_half,      transpose,
};

}  // namespace lance::LANCE_INSTRUCTION_SET
