#include "blocks.h"
#include "geometry.h"
#include "tucker.h"

namespace lance {
namespace {

// What one call reads: a patch is a column of `size` values, (channel, taps...), for every output position. The spatial
// modes but the last are taken as one, the outer mode.
struct Patches {
  struct Run {
    int64_t begin;
    int64_t end;
  };
  int64_t groups = 1;
  int64_t channels = 0;  // of a group
  int64_t size = 0;      // channels * tap_count
  int64_t tap_count = 1;
  int64_t positions = 1;  // of a sample
  int64_t width = 1;      // positions of the last mode
  int64_t last_taps = 1;
  int64_t sample_stride = 0;
  int64_t channel_stride = 0;
  Sizes output;
  Sizes outer;            // (outer taps, outer positions): offset in x of what a tap reads, -1 for padding
  Sizes last;             // (last taps, width): the same
  std::vector<Run> runs;  // by last tap: positions whose values lie next to each other
};

// Columns of patches within one row of one sample's output.
struct Segment {
  int64_t sample;  // offset in x
  int64_t outer;
  int64_t begin;
  int64_t count;
};

// (taps * more taps, positions * more positions) from (taps, positions) of two modes.
Sizes combined(const Sizes& places, int64_t taps, const Sizes& more_places, int64_t more_taps) {
  const int64_t positions = static_cast<int64_t>(places.size()) / taps;
  const int64_t more_positions = static_cast<int64_t>(more_places.size()) / more_taps;
  Sizes both;
  for (int64_t tap = 0; tap < taps * more_taps; ++tap) {
    for (int64_t at = 0; at < positions * more_positions; ++at) {
      const int64_t first = places[tap / more_taps * positions + at / more_positions];
      const int64_t second = more_places[tap % more_taps * more_positions + at % more_positions];
      both.push_back(first < 0 || second < 0 ? -1 : first + second);
    }
  }
  return both;
}

Patches make_patches(const char* operation, const Tensor& x, const Sizes& kernel, const Geometry& geometry) {
  check_floating(operation, "x", x);
  const int64_t groups = geometry.groups;
  check(groups >= 1 && x.dim() > 1 && x.size(1) % groups == 0, "lance::", operation, ": groups is ", groups,
        "; expected a divisor of C of x, whose shape is ", shape_string(x));
  Patches patches;
  patches.groups = groups;
  patches.channels = x.size(1) / groups;
  Sizes weight{groups, patches.channels};
  weight.insert(weight.end(), kernel.begin(), kernel.end());
  const Sizes output = check_geometry(operation, sizes_of(x), weight, geometry);
  patches.output.assign(output.begin() + 2, output.end());
  patches.sample_stride = x.stride(0);
  patches.channel_stride = x.stride(1);
  patches.tap_count = count_of(kernel);
  patches.size = patches.channels * patches.tap_count;
  patches.positions = count_of(patches.output);
  patches.width = patches.output.back();
  patches.last_taps = kernel.back();
  patches.outer = {0};
  for (size_t mode = 0; mode < kernel.size(); ++mode) {
    Sizes places;
    for (int64_t tap = 0; tap < kernel[mode]; ++tap) {
      for (int64_t at = 0; at < patches.output[mode]; ++at) {
        const int64_t index = geometry.stride[mode] * at + geometry.dilation[mode] * tap - geometry.pads(mode).first;
        const int64_t row = padded_row(index, x.size(static_cast<int64_t>(2 + mode)), geometry.padding_mode);
        places.push_back(row < 0 ? -1 : row * x.stride(static_cast<int64_t>(2 + mode)));
      }
    }
    if (mode + 1 == kernel.size()) {
      patches.last = std::move(places);
    } else {
      patches.outer = combined(patches.outer, mode == 0 ? 1 : kernel[0], places, kernel[mode]);
    }
  }
  const int64_t width = patches.width;
  for (int64_t tap = 0; tap < kernel.back(); ++tap) {
    const int64_t* places = patches.last.data() + tap * width;
    Patches::Run longest{0, 0};
    for (int64_t begin = 0, end = 0; begin < width; begin = end) {
      for (end = begin + 1; end < width && places[begin] >= 0 && places[end] == places[end - 1] + 1;) {
        ++end;
      }
      if (end - begin > std::max<int64_t>(longest.end - longest.begin, 1)) {
        longest = {begin, end};
      }
    }
    patches.runs.push_back(longest);
  }
  return patches;
}

void check_factor(const char* operation, const Tensor& factor, int64_t groups, int64_t size) {
  check_floating(operation, "factor", factor);
  check(factor.dim() == 3 && factor.size(0) == groups && factor.size(1) == size && factor.size(2) > 0,
        "lance::", operation, ": factor has shape ", shape_string(factor), "; expected (", groups, ", ", size,
        ", rank) with rank >= 1, one basis of the patches a group");
  check(factor.is_cpu(), "lance::", operation, ": factor is not on cpu; expected cpu, where the first argument is");
}

// Copies `count` neighbours.
template <typename S, typename T>
void copy_run(const S* from, T* to, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    for (int64_t index = 0; index < count; ++index) {
      to[index] = from[index];
    }
  } else if constexpr (std::is_same_v<T, float>) {
    widen(from, std::is_same_v<S, BFloat16> ? ScalarType::BFloat16 : ScalarType::Half, to, count);
  }
}

// Rows [first_row, first_row + rows) of a group's patches at columns [begin, begin + count) of all samples' positions:
// to (rows, count), rows `to_row` apart.
template <typename T>
void read_patches(const Patches& patches, const Tensor& x, int64_t group, int64_t first_row, int64_t rows,
                  int64_t begin, int64_t count, T* to, int64_t to_row) {
  const int64_t width = patches.width;
  const int64_t outer_positions = patches.positions / width;
  std::vector<Segment> segments;
  for (int64_t column = begin; column < begin + count;) {
    const int64_t row = column / width;
    const int64_t here = std::min((row + 1) * width, begin + count) - column;
    segments.push_back(
        {row / outer_positions * patches.sample_stride, row % outer_positions, column - row * width, here});
    column += here;
  }
  dispatch_floating(x.scalar_type(), [&](auto value) {
    using S = decltype(value);
    const S* data = static_cast<const S*>(x.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t channel = group * patches.channels + (first_row + row) / patches.tap_count;
      const int64_t tap = (first_row + row) % patches.tap_count;
      const int64_t last_tap = tap % patches.last_taps;
      const int64_t* outer = patches.outer.data() + tap / patches.last_taps * outer_positions;
      const int64_t* places = patches.last.data() + last_tap * width;
      const Patches::Run run = patches.runs[static_cast<size_t>(last_tap)];
      const S* image = data + channel * patches.channel_stride;
      T* target = to + row * to_row;
      for (const Segment& segment : segments) {
        if (outer[segment.outer] < 0) {
          std::fill_n(target, segment.count, T(0));
          target += segment.count;
          continue;
        }
        const S* from = image + segment.sample + outer[segment.outer];
        const int64_t end = segment.begin + segment.count;
        const int64_t first = std::clamp(run.begin, segment.begin, end);
        const int64_t last = std::clamp(run.end, first, end);
        for (int64_t at = segment.begin; at < first; ++at) {
          *target++ = places[at] < 0 ? T(0) : static_cast<T>(from[places[at]]);
        }
        if (first < last) {
          copy_run(from + places[first], target, last - first);
          target += last - first;
        }
        for (int64_t at = last; at < end; ++at) {
          *target++ = places[at] < 0 ? T(0) : static_cast<T>(from[places[at]]);
        }
      }
    }
  });
}

// Elements of scratch that all threads may have together: a quarter of x, or a few pages where x is small.
template <typename T>
int64_t scratch_elements(const Tensor& x) {
  constexpr int64_t least = 1 << 15;
  return std::max<int64_t>(x.numel() * element_size(x.scalar_type()) / 4 / static_cast<int64_t>(sizeof(T)), least);
}

template <typename T>
void project(const Patches& patches, const Tensor& x, const Tensor& factor, Tensor& core) {
  constexpr int64_t cache = 1 << 15;  // elements of patches a thread has at a time
  constexpr int64_t few = 32;         // positions a sample; where there are no more, samples are taken together
  const int64_t rank = factor.size(2);
  const int64_t size = patches.size;
  const int64_t positions = patches.positions;
  const int64_t together = positions < few ? x.size(0) : 1;
  const int64_t columns = together * positions;  // that one row of products may have
  const ScalarType dtype = core.scalar_type();
  const bool direct = dtype == dtype_of<T> && together == 1;
  const std::vector<T> directions = values_of<T>(factor);  // (groups, n, rank)
  const int64_t room = std::min(scratch_elements<T>(x) / torch::stable::get_num_threads(), cache);
  const int64_t block = std::min(columns, std::clamp<int64_t>(room / size, few, 512));
  // An odd number of cache lines between rows, so that they do not fall into the same sets.
  const int64_t row = (block + 15) / 16 * 16 + 16;
  const int64_t depth = std::clamp<int64_t>(room / row, 1, size);
  const int64_t blocks = (columns + block - 1) / block;
  const int64_t tasks = x.size(0) / together * patches.groups * blocks;
  parallel_for(0, tasks, 1, [&](int64_t first, int64_t end) {
    const Buffer<T> scratch(depth * row);
    const Buffer<T> result(direct ? 0 : rank * block);
    for (int64_t task = first; task < end; ++task) {
      const int64_t group = task / blocks % patches.groups;
      // Columns of all samples.
      const int64_t start = task / blocks / patches.groups * columns + task % blocks * block;
      const int64_t count = std::min(block, columns - task % blocks * block);
      // Of rank 0 of this group, in core (B, groups, rank, positions).
      const auto target = [&](int64_t column) {
        return (column / positions * patches.groups + group) * rank * positions + column % positions;
      };
      Product<T> p;
      p.rows = rank;
      p.columns = count;
      p.a_row = 1;
      p.a_inner = rank;
      p.b = scratch.data();
      p.b_inner = row;
      p.c = direct ? core.mutable_data_ptr<T>() + target(start) : result.data();
      p.c_row = direct ? positions : block;
      for (int64_t done = 0; done < size; done += depth) {
        p.inner_depth = std::min(depth, size - done);
        p.accumulate = done > 0;
        read_patches(patches, x, group, done, p.inner_depth, start, count, scratch.data(), row);
        p.a = directions.data() + (group * size + done) * rank;
        product(p);
      }
      for (int64_t column = 0; column < count && !direct;) {
        const int64_t here = std::min(positions - (start + column) % positions, count - column);
        for (int64_t index = 0; index < rank; ++index) {
          narrow(result.data() + index * block + column,
                 offset_by(core.mutable_data_ptr(), dtype, target(start + column) + index * positions), dtype, here);
        }
        column += here;
      }
    }
  });
}

Tensor patch_project(const Tensor& x, const Tensor& factor, const Sizes& kernel, const Sizes& stride,
                     const Sizes& padding, const Sizes& dilation, int64_t groups, const std::string& padding_mode) {
  constexpr const char* operation = "patch_project";
  const Patches patches = make_patches(operation, x, kernel, {stride, padding, dilation, groups, padding_mode});
  check_factor(operation, factor, groups, patches.size);
  Sizes sizes{x.size(0), groups * factor.size(2)};
  sizes.insert(sizes.end(), patches.output.begin(), patches.output.end());
  Tensor core = torch::stable::new_empty(x, sizes);
  if (core.numel() == 0) {
    return core;
  }
  if (x.numel() == 0) {
    return torch::stable::zero_(core);
  }
  dispatch_accumulation(accumulation_dtype(x.scalar_type()),
                        [&](auto value) { project<decltype(value)>(patches, x, factor, core); });
  return core;
}

// Upper panels of one group's Gram matrix: sums (padded, padded) += patches patches^T. A stage of columns is packed as
// panels (panel, count, width) by all threads, then each takes tiles of the matrix.
template <typename T>
void add_gram(const Patches& patches, const Tensor& x, int64_t group, int64_t width, int64_t padded, int64_t stage,
              T* sums) {
  const int64_t panels = padded / width;
  const int64_t total = x.size(0) * patches.positions;
  const Buffer<T> packed(stage * padded);
  for (int64_t begin = 0; begin < total; begin += stage) {
    const int64_t count = std::min(stage, total - begin);
    parallel_for(0, panels, 1, [&](int64_t first, int64_t end) {
      const Buffer<T> rows(width * count);
      for (int64_t panel = first; panel < end; ++panel) {
        const int64_t here = std::min(width, patches.size - panel * width);
        read_patches(patches, x, group, panel * width, here, begin, count, rows.data(), count);
        gather(rows.data(), dtype_of<T>, count, 1, here, count, packed.data() + panel * width * count, width);
      }
    });
    parallel_for(0, panels * (panels + 1) / 2, 1, [&](int64_t first, int64_t end) {
      for (int64_t tile = first; tile < end; ++tile) {
        int64_t right = 0;
        int64_t left = tile;
        while (left > right) {
          left -= ++right;
        }
        Product<T> p;
        p.rows = std::min(width, patches.size - left * width);
        p.columns = std::min(width, patches.size - right * width);
        p.inner_depth = count;
        p.a = packed.data() + left * width * count;
        p.a_row = 1;
        p.a_inner = width;
        p.b = packed.data() + right * width * count;
        p.b_inner = width;
        p.c = sums + left * width * padded + right * width;
        p.c_row = padded;
        p.accumulate = true;
        product(p);
      }
    });
  }
}

template <typename T>
void add_grams(const Patches& patches, const Tensor& x, const Tensor& gram) {
  const int64_t lanes = routines().vector_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t size = patches.size;
  const int64_t width = size <= lanes ? lanes : 2 * lanes;
  const int64_t padded = (size + width - 1) / width * width;
  const int64_t threads = torch::stable::get_num_threads();
  // Many small groups are shared out whole, and every thread has a stage of its own.
  const bool share = patches.groups >= 2 * threads;
  const int64_t room = scratch_elements<T>(x) / (share ? threads : 1);
  const int64_t stage = std::min(x.size(0) * patches.positions,
                                 std::clamp<int64_t>(room / (padded + width * (share ? 1 : threads)), 32, 512));
  parallel_for(0, patches.groups, share ? 1 : patches.groups, [&](int64_t first, int64_t end) {
    const Buffer<T> sums(padded * padded);
    for (int64_t group = first; group < end; ++group) {
      std::fill_n(sums.data(), padded * padded, T(0));
      add_gram(patches, x, group, width, padded, stage, sums.data());
      dispatch_accumulation(gram.scalar_type(), [&](auto value) {
        using G = decltype(value);
        G* target = gram.mutable_data_ptr<G>() + group * gram.stride(0);
        parallel_for(0, size, 1 + 16384 / size, [&](int64_t begin, int64_t stop) {
          for (int64_t i = begin; i < stop; ++i) {
            for (int64_t j = 0; j < size; ++j) {
              const T sum = sums.data()[i < j ? i * padded + j : j * padded + i];
              target[i * gram.stride(1) + j * gram.stride(2)] += static_cast<G>(sum);
            }
          }
        });
      });
    }
  });
}

void patch_gram_(const Tensor& gram, const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                 const Sizes& dilation, int64_t groups, const std::string& padding_mode) {
  constexpr const char* operation = "patch_gram_";
  const Patches patches = make_patches(operation, x, kernel, {stride, padding, dilation, groups, padding_mode});
  const int64_t size = patches.size;
  check(gram.dim() == 3 && gram.size(0) == groups && gram.size(1) == size && gram.size(2) == size, "lance::", operation,
        ": gram has shape ", shape_string(gram), "; expected (", groups, ", ", size, ", ", size,
        ") for the patches of x, whose shape is ", shape_string(x));
  const bool wide = x.scalar_type() == ScalarType::Double;
  const ScalarType dtype = gram.scalar_type();
  check(dtype == ScalarType::Double || (dtype == ScalarType::Float && !wide), "lance::", operation, ": gram has dtype ",
        dtype_name(dtype), "; expected ", wide ? "" : "torch.float32 or ", "torch.float64 for x of ",
        dtype_name(x.scalar_type()));
  check(gram.is_cpu(), "lance::", operation, ": gram is not on cpu; expected cpu, where x is");
  check_not_expanded(operation, "gram", gram);
  if (x.numel() == 0 || size == 0) {
    return;
  }
  dispatch_accumulation(accumulation_dtype(x.scalar_type()),
                        [&](auto value) { add_grams<decltype(value)>(patches, x, gram); });
}

void check_weight_grad(const Tensor& grad_output, const Tensor& core, const Tensor& factor, const Factors& spatial,
                       const Sizes& weight_size, int64_t groups) {
  constexpr const char* operation = "patch_weight_grad";
  check(weight_size.size() >= 3 && groups >= 1 && weight_size[0] % groups == 0, "lance::", operation,
        ": weight_size is ", list_string(weight_size), " and groups ", groups,
        "; expected (O, C / groups, *kernel) and O a multiple of groups");
  const int64_t modes = static_cast<int64_t>(weight_size.size()) - 2;
  check(static_cast<int64_t>(spatial.size()) == modes && core.dim() == modes + 2, "lance::", operation,
        ": spatial_factors has ", spatial.size(), " entries; expected ", modes,
        ", one a spatial mode of core, whose shape is ", shape_string(core));
  Factors factors(2);
  factors.insert(factors.end(), spatial.begin(), spatial.end());
  check_factors(operation, "core", core, factors, 1);
  check_factor(operation, factor, groups, count_of(weight_size) / std::max<int64_t>(weight_size[0], 1));
  check(core.size(1) == groups * factor.size(2), "lance::", operation, ": core has shape ", shape_string(core),
        "; expected ", groups * factor.size(2), " channels, groups times the rank of factor, whose shape is ",
        shape_string(factor));
  Sizes expected{core.size(0), weight_size[0]};
  for (int64_t mode = 0; mode < modes; ++mode) {
    expected.push_back(spatial[mode] ? spatial[mode]->size(0) : core.size(2 + mode));
  }
  check(sizes_of(grad_output) == expected, "lance::", operation, ": grad_output has shape ", shape_string(grad_output),
        "; expected ", shape_string(expected), ", as core, spatial_factors and weight_size give it");
  check_same(operation, grad_output, "core", core);
}

// Multiplications that take the spatial modes of `tensor` through their factors, one mode after the other.
double spatial_cost(const Tensor& tensor, const Factors& spatial, bool project) {
  double elements = static_cast<double>(tensor.numel());
  double cost = 0;
  for (const auto& factor : spatial) {
    if (factor) {
      cost += elements * static_cast<double>(factor->size(project ? 1 : 0));
      elements *=
          static_cast<double>(factor->size(project ? 1 : 0)) / static_cast<double>(factor->size(project ? 0 : 1));
    }
  }
  return cost;
}

// Whether projecting grad_output onto the spatial factors takes fewer operations than expanding the core.
bool projects(const Tensor& grad_output, const Tensor& core, const Factors& spatial, int64_t rank) {
  const double projected = static_cast<double>(grad_output.size(1) * rank * (core.numel() / core.size(1)));
  const double expanded = static_cast<double>(rank * grad_output.numel());
  return spatial_cost(grad_output, spatial, true) + projected < spatial_cost(core, spatial, false) + expanded;
}

// `tensor` with every spatial mode multiplied by its matrix, dense in T; itself where nothing has to be done.
template <typename T>
Tensor multiply_spatial(const Tensor& tensor, const Factors& spatial, bool project) {
  Factors factors(2);
  factors.insert(factors.end(), spatial.begin(), spatial.end());
  const bool any = std::any_of(spatial.begin(), spatial.end(), [](const auto& factor) { return factor.has_value(); });
  if (!any && tensor.scalar_type() == dtype_of<T>) {
    return torch::stable::contiguous(tensor);
  }
  return multiply_modes(tensor, project ? projecting<T>(factors) : expanding<T>(factors), dtype_of<T>);
}

template <typename T>
void weight_grad(const Tensor& grad_output, const Tensor& core, const Tensor& factor, const Factors& spatial,
                 int64_t groups, Tensor& result) {
  const int64_t rank = factor.size(2);
  const int64_t size = factor.size(1);
  const bool project = projects(grad_output, core, spatial, rank);
  const Factors none(spatial.size());
  const Tensor grad = multiply_spatial<T>(grad_output, project ? spatial : none, true);
  const Tensor kept = multiply_spatial<T>(core, project ? none : spatial, false);
  const int64_t samples = grad.size(0);
  const int64_t outputs = grad.size(1) / groups;
  const int64_t positions = grad.numel() / samples / grad.size(1);
  const std::vector<T> directions = values_of<T>(factor);  // (groups, n, rank)
  constexpr int64_t rows = 48;                             // outputs a task takes
  const int64_t pieces = (outputs + rows - 1) / rows;
  const ScalarType dtype = result.scalar_type();
  const auto group_of = [&](int64_t group, const Buffer<T>& columns, const Buffer<T>& expanding) {
    // (samples * positions, rank), and the factor's transpose, (rank, n)
    for (int64_t sample = 0; sample < samples; ++sample) {
      gather(kept.const_data_ptr<T>() + (sample * groups + group) * rank * positions, dtype_of<T>, positions, 1, rank,
             positions, columns.data() + sample * positions * rank, rank);
    }
    gather(directions.data() + group * size * rank, dtype_of<T>, rank, 1, size, rank, expanding.data(), size);
    parallel_for(0, pieces, 1, [&](int64_t first, int64_t end) {
      const Buffer<T> sums(rows * rank);
      const Buffer<T> wide(dtype == dtype_of<T> ? 0 : rows * size);
      for (int64_t piece = first; piece < end; ++piece) {
        const int64_t here = std::min(rows, outputs - piece * rows);
        const int64_t output = group * outputs + piece * rows;
        Product<T> p;
        p.rows = here;
        p.columns = rank;
        p.outer_depth = samples;
        p.inner_depth = positions;
        p.a = grad.const_data_ptr<T>() + output * positions;
        p.a_row = positions;
        p.a_outer = groups * outputs * positions;
        p.a_inner = 1;
        p.b = columns.data();
        p.b_outer = positions * rank;
        p.b_inner = rank;
        p.c = sums.data();
        p.c_row = rank;
        product(p);
        Product<T> q;
        q.rows = here;
        q.columns = size;
        q.inner_depth = rank;
        q.a = sums.data();
        q.a_row = rank;
        q.a_inner = 1;
        q.b = expanding.data();
        q.b_inner = size;
        q.c = dtype == dtype_of<T> ? result.mutable_data_ptr<T>() + output * size : wide.data();
        q.c_row = size;
        product(q);
        if (dtype != dtype_of<T>) {
          narrow(wide.data(), offset_by(result.mutable_data_ptr(), dtype, output * size), dtype, here * size);
        }
      }
    });
  };
  const int64_t threads = torch::stable::get_num_threads();
  parallel_for(0, groups, groups >= 2 * threads ? 1 : groups, [&](int64_t first, int64_t end) {
    const Buffer<T> columns(samples * positions * rank);
    const Buffer<T> expanding(rank * size);
    for (int64_t group = first; group < end; ++group) {
      group_of(group, columns, expanding);
    }
  });
}

Tensor patch_weight_grad(const Tensor& grad_output, const Tensor& core, const Tensor& factor, const Factors& spatial,
                         const Sizes& weight_size, int64_t groups) {
  check_weight_grad(grad_output, core, factor, spatial, weight_size, groups);
  Tensor result = torch::stable::new_empty(grad_output, weight_size);
  if (result.numel() == 0) {
    return result;
  }
  if (grad_output.numel() == 0 || core.numel() == 0) {
    return torch::stable::zero_(result);
  }
  dispatch_accumulation(accumulation_dtype(core.scalar_type()), [&](auto value) {
    weight_grad<decltype(value)>(grad_output, core, factor, spatial, groups, result);
  });
  return result;
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("patch_project", TORCH_BOX(&lance::patch_project));
  m.impl("patch_gram_", TORCH_BOX(&lance::patch_gram_));
  m.impl("patch_weight_grad", TORCH_BOX(&lance::patch_weight_grad));
}
