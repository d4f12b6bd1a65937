// pack_core and unpack_core; the layout of the buffer is described in lance_kernels/ops/pack_core.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "common.h"

namespace lance {
namespace {

constexpr int missing = 255;
constexpr int scale_count = missing - 1;
constexpr int64_t groups_at_once = 1024;

// How codes of one number of bits are kept: as digits of their byte, to which `largest` was added. A scale is `steps`
// steps.
template <int bits>
struct Format {
  static constexpr int base = bits == 2 ? 3 : 1 << bits;
  static constexpr int per_byte = bits == 2 ? 5 : 8 / bits;
  static constexpr int group = bits == 2 ? 20 : 16;
  static constexpr int bytes = group / per_byte;
  static constexpr int largest = bits > 1 ? (1 << (bits - 1)) - 1 : 1;
  static constexpr float steps = bits == 2 ? 1.25f : largest;
  static constexpr int spacing = bits > 1 ? 1 : 2;
};

void check_bits(const char* operation, int64_t bits) {
  check(bits == 8 || bits == 4 || bits == 2 || bits == 1, "lance::", operation, ": bits is ", bits,
        "; expected 8, 4, 2 or 1");
}

struct Layout {
  int64_t count;
  int64_t groups;
  int64_t codes;   // where they begin
  int64_t scales;  // where they begin
  int64_t bytes;

  template <typename Form>
  Layout(int64_t count, Form)
      : count(count),
        groups((count + Form::group - 1) / Form::group),
        codes(4),
        scales(codes + (count + Form::per_byte - 1) / Form::per_byte),
        bytes(scales + groups) {}
};

// Falling from `base` by eighths of an octave.
std::array<float, scale_count> scales_below(float base) {
  static const std::array<float, scale_count> table = [] {
    std::array<float, scale_count> powers;
    for (int code = 0; code < scale_count; ++code) {
      powers[code] = static_cast<float>(std::exp2(code / -8.0));
    }
    return powers;
  }();
  std::array<float, scale_count> scales;
  for (int code = 0; code < scale_count; ++code) {
    scales[code] = base * table[code];
  }
  return scales;
}

// The last scale that is not below the magnitude. A float's bits above those of 1 are its logarithm to within 0.7 of an
// eighth of an octave, from below.
int scale_code(const std::array<float, scale_count>& scales, float magnitude) {
  const float ratio = scales[0] / magnitude;
  int32_t bits;
  std::memcpy(&bits, &ratio, sizeof(bits));
  int code = std::clamp(((bits & 0x7fffffff) - 0x3f800000) >> 20, 0, scale_count - 2);
  code += scales[code + 1] >= magnitude;
  // Where scales round, beneath the least normal number, more of them may be alike.
  while (code + 1 < scale_count && scales[code + 1] >= magnitude) {
    ++code;
  }
  while (code > 0 && scales[code] < magnitude) {
    --code;
  }
  return code;
}

template <int bits>
using Group = std::array<float, Format<bits>::group>;

// One group in float32, zeros behind the core's end.
template <int bits, typename T>
Group<bits> load(const T* values, const Layout& layout, int64_t index) {
  constexpr int64_t most = Format<bits>::group;
  Group<bits> group;
  const T* from = values + index * most;
  const int64_t size = layout.count - index * most;
  if (size >= most) {
    for (int64_t place = 0; place < most; ++place) {
      group[place] = static_cast<float>(from[place]);
    }
  } else {
    group.fill(0);
    std::transform(from, from + size, group.begin(), [](T value) { return static_cast<float>(value); });
  }
  return group;
}

// What a group of `size` values chooses its scale by: the largest magnitude; as integers, NaN and infinity are above
// every number.
template <int bits>
float magnitude_of(const Group<bits>& group, int64_t /*size*/) {
  std::array<int32_t, Format<bits>::group> words;
  std::memcpy(words.data(), group.data(), sizeof(group));
  int32_t largest = 0;
  for (const int32_t word : words) {
    largest = std::max(largest, word & 0x7fffffff);
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof(magnitude));
  return magnitude;
}

// For signs the mean magnitude. Neighbours are added first: the order of sums is part of the format. Divided before,
// they stay finite.
template <>
float magnitude_of<1>(const Group<1>& group, int64_t size) {
  constexpr int64_t most = Format<1>::group;
  Group<1> sums;
  for (int64_t place = 0; place < most; ++place) {
    sums[place] = std::abs(group[place]) / most;
  }
  for (int64_t width = most / 2; width > 0; width /= 2) {
    for (int64_t place = 0; place < width; ++place) {
      sums[place] = sums[2 * place] + sums[2 * place + 1];
    }
  }
  return sums[0] * (static_cast<float>(most) / static_cast<float>(size));
}

// One group's codes, the first the least significant digit of its byte; with one bit, 1 for a value that is not
// negative.
template <int bits>
std::array<uint8_t, Format<bits>::bytes> codes_of(const Group<bits>& group, float step) {
  using Form = Format<bits>;
  constexpr float largest = Form::largest;
  // Adding it leaves no bits behind the point: rounds to nearest, ties to even.
  constexpr float rounder = 1.5f * (1 << 23);
  std::array<int32_t, Form::group> whole;
  for (int64_t place = 0; place < Form::group; ++place) {
    if constexpr (bits == 1) {
      whole[place] = group[place] < 0 ? 0 : 1;
    } else {
      const float ratio = std::min(std::max(group[place] / step, -largest), largest);
      const float rounded = (ratio + rounder) - rounder;
      whole[place] = static_cast<int32_t>(rounded + largest);
    }
  }
  std::array<uint8_t, Form::bytes> codes;
  for (int byte = 0; byte < Form::bytes; ++byte) {
    int32_t packed = 0;
    for (int place = Form::per_byte - 1; place >= 0; --place) {
      packed = packed * Form::base + whole[byte * Form::per_byte + place];
    }
    codes[byte] = static_cast<uint8_t>(packed);
  }
  return codes;
}

// Two passes over a core that fits the cache: the groups' magnitudes, then the codes. Scratch: one float a group.
template <int bits, typename T>
void pack(const T* values, const Layout& layout, uint8_t* packed) {
  constexpr int64_t most = Format<bits>::group;
  std::vector<float> magnitudes(layout.groups);
  parallel_for(0, layout.groups, groups_at_once, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t size = std::min(most, layout.count - group * most);
      magnitudes[group] = magnitude_of<bits>(load<bits>(values, layout, group), size);
    }
  });
  float base = 0;
  for (const float magnitude : magnitudes) {
    base = std::isfinite(magnitude) ? std::max(base, magnitude) : base;
  }
  const std::array<float, scale_count> scales = scales_below(base);
  parallel_for(0, layout.groups, groups_at_once, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const float magnitude = magnitudes[group];
      int chosen = missing;
      float step = 0;
      if (std::isfinite(magnitude)) {
        chosen = scale_code(scales, magnitude);
        step = scales[chosen] / Format<bits>::steps;
      }
      packed[layout.scales + group] = static_cast<uint8_t>(chosen);
      // Without a step every code is that of zero; signs need none.
      const bool usable = step > 0 || (bits == 1 && chosen != missing);
      const auto codes = usable ? codes_of<bits>(load<bits>(values, layout, group), step) : codes_of<bits>({}, 1);
      const int64_t offset = group * static_cast<int64_t>(codes.size());
      const int64_t size = std::min<int64_t>(codes.size(), layout.scales - layout.codes - offset);
      std::copy_n(codes.begin(), size, packed + layout.codes + offset);
    }
  });
  std::memcpy(packed, &base, sizeof(base));
}

template <int bits, typename T>
void unpack(const uint8_t* packed, const Layout& layout, T* values) {
  using Form = Format<bits>;
  constexpr int64_t most = Form::group;
  float base;
  std::memcpy(&base, packed, sizeof(base));
  const std::array<float, scale_count> scales = scales_below(base);
  std::array<float, 256> steps;
  steps.fill(std::numeric_limits<float>::quiet_NaN());
  for (int code = 0; code < scale_count; ++code) {
    steps[code] = scales[code] / Form::steps;
  }
  parallel_for(0, layout.groups, groups_at_once, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const float step = steps[packed[layout.scales + group]];
      const uint8_t* codes = packed + layout.codes + group * Form::bytes;
      T* to = values + group * most;
      const int64_t size = std::min(most, layout.count - group * most);
      const auto write = [&](int64_t byte, int places) {
        int digits = codes[byte];
        for (int place = 0; place < places; ++place, digits /= Form::base) {
          const int code = digits % Form::base * Form::spacing - Form::largest;
          to[byte * Form::per_byte + place] = static_cast<T>(static_cast<float>(code) * step);
        }
      };
      const int64_t whole = size / Form::per_byte;
      for (int64_t byte = 0; byte < whole; ++byte) {
        write(byte, Form::per_byte);
      }
      if (size % Form::per_byte) {
        write(whole, static_cast<int>(size % Form::per_byte));
      }
    }
  });
}

// Calls `body` with the number of bits as a type.
template <typename Body>
auto dispatch_bits(int64_t bits, const Body& body) {
  switch (bits) {
    case 8:
      return body(std::integral_constant<int, 8>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    default:
      return body(std::integral_constant<int, 1>{});
  }
}

Layout layout_of(int64_t count, int64_t bits) {
  return dispatch_bits(bits, [count](auto width) { return Layout(count, Format<decltype(width)::value>()); });
}

Tensor pack_core(const Tensor& core, int64_t bits) {
  check_bits("pack_core", bits);
  check_floating("pack_core", "core", core);
  const Layout layout = layout_of(core.numel(), bits);
  const Tensor dense = torch::stable::contiguous(core);
  Tensor packed = torch::stable::new_empty(core, {layout.bytes}, ScalarType::Byte);
  dispatch_floating(core.scalar_type(), [&](auto type) {
    using T = decltype(type);
    dispatch_bits(bits, [&](auto width) {
      pack<decltype(width)::value>(static_cast<const T*>(dense.const_data_ptr()), layout,
                                   static_cast<uint8_t*>(packed.mutable_data_ptr()));
    });
  });
  return packed;
}

Tensor unpack_core(const Tensor& packed, std::vector<int64_t> size, int64_t bits, ScalarType dtype) {
  check_bits("unpack_core", bits);
  check(is_floating(dtype), "lance::unpack_core: dtype is ", dtype_name(dtype),
        "; expected float32, float64, bfloat16 or float16");
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1, "lance::unpack_core: packed is ",
        dtype_name(packed.scalar_type()), " of shape ", shape_string(packed), "; expected a flat uint8 buffer");
  int64_t count = 1;
  for (const int64_t extent : size) {
    check(extent >= 0, "lance::unpack_core: size is ", shape_string(size), "; expected no negative entry");
    count *= extent;
  }
  const Layout layout = layout_of(count, bits);
  check(packed.size(0) == layout.bytes, "lance::unpack_core: packed has ", packed.size(0), " bytes; expected ",
        layout.bytes, " for size ", shape_string(size), " in ", bits, " bits");
  const Tensor dense = torch::stable::contiguous(packed);
  Tensor core = torch::stable::new_empty(packed, size, dtype);
  dispatch_floating(dtype, [&](auto type) {
    using T = decltype(type);
    dispatch_bits(bits, [&](auto width) {
      unpack<decltype(width)::value>(static_cast<const uint8_t*>(dense.const_data_ptr()), layout,
                                     static_cast<T*>(core.mutable_data_ptr()));
    });
  });
  return core;
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("pack_core", TORCH_BOX(&lance::pack_core));
  m.impl("unpack_core", TORCH_BOX(&lance::unpack_core));
}
