#include <numeric>

#include "memory.h"
#include "mode_gram_checks.h"

namespace lance {
namespace {

// The unfolding of one mode: rows are the positions of all other modes, columns those of the mode. Rows within a run
// lie `row_stride` apart; runs are counted by loops, outermost first.
struct Unfolding {
  struct Loop {
    int64_t count;
    int64_t stride;
  };
  int64_t columns = 1;
  int64_t column_stride = 1;
  int64_t rows = 1;
  int64_t run = 1;
  int64_t row_stride = 1;
  std::vector<Loop> loops;

  int64_t offset(int64_t run_index) const {
    int64_t at = 0;
    for (size_t loop = loops.size(); loop-- > 0;) {
      at += run_index % loops[loop].count * loops[loop].stride;
      run_index /= loops[loop].count;
    }
    return at;
  }
};

Unfolding unfold(const Sizes& sizes, const Sizes& strides, int64_t mode) {
  Unfolding unfolding;
  unfolding.columns = sizes[mode];
  unfolding.column_stride = strides[mode];
  Sizes others;
  for (int64_t other = 0; other < static_cast<int64_t>(sizes.size()); ++other) {
    if (other != mode && sizes[other] > 1) {
      others.push_back(other);
      unfolding.rows *= sizes[other];
    }
  }
  std::stable_sort(others.begin(), others.end(),
                   [&](int64_t left, int64_t right) { return strides[left] > strides[right]; });
  while (!others.empty()) {
    const int64_t other = others.back();
    if (unfolding.run == 1 && unfolding.loops.empty()) {
      unfolding.run = sizes[other];
      unfolding.row_stride = strides[other];
    } else if (unfolding.loops.empty() && strides[other] == unfolding.run * unfolding.row_stride) {
      unfolding.run *= sizes[other];
    } else {
      unfolding.loops.insert(unfolding.loops.begin(), {sizes[other], strides[other]});
    }
    others.pop_back();
  }
  return unfolding;
}

// Panels of a Gram matrix: two vectors of columns, one where the matrix is no wider.
template <typename T>
int64_t panel_width(int64_t columns) {
  const int64_t lanes = routines().vector_bytes / static_cast<int64_t>(sizeof(T));
  return columns <= lanes ? lanes : 2 * lanes;
}

// Rows [begin, begin + count) of an unfolding as panels (panel, count, width); the columns that fill up the last panel
// are left alone.
template <typename T>
void pack(const void* x, ScalarType dtype, const Unfolding& unfolding, int64_t begin, int64_t count, int64_t width,
          T* panels) {
  for (int64_t row = 0; row < count;) {
    const int64_t within = (begin + row) % unfolding.run;
    const int64_t here = std::min(unfolding.run - within, count - row);
    const int64_t offset = unfolding.offset((begin + row) / unfolding.run) + within * unfolding.row_stride;
    for (int64_t column = 0; column < unfolding.columns; column += width) {
      gather(offset_by(x, dtype, offset + column * unfolding.column_stride), dtype, here, unfolding.row_stride,
             std::min(width, unfolding.columns - column), unfolding.column_stride,
             panels + column * count + row * width, width);
    }
    row += here;
  }
}

// gram [+]= left^T right for two panels of `depth` rows; gram has rows `gram_row` apart.
template <typename T>
void add_panels(const T* left, const T* right, int64_t depth, int64_t stride, int64_t rows, int64_t columns, T* gram,
                int64_t gram_row) {
  Product<T> p;
  p.rows = rows;
  p.columns = columns;
  p.inner_depth = depth;
  p.a = left;
  p.a_row = 1;
  p.a_inner = stride;
  p.b = right;
  p.b_inner = stride;
  p.c = gram;
  p.c_row = gram_row;
  p.accumulate = true;
  product(p);
}

// Upper panels of the Gram matrix of `count` packed rows.
template <typename T>
void add_packed(const T* panels, int64_t count, int64_t columns, int64_t width, T* gram, int64_t gram_row) {
  for (int64_t right = 0; right < columns; right += width) {
    for (int64_t left = 0; left <= right; left += width) {
      add_panels(panels + left * count, panels + right * count, count, width, std::min(width, columns - left),
                 std::min(width, columns - right), gram + left * gram_row + right, gram_row);
    }
  }
}

// The running Gram matrix of one mode, (size, size), upper panels only until it is handed over.
template <typename T>
struct Gram {
  int64_t mode = 0;
  int64_t size = 0;
  int64_t width = 0;
  int64_t row = 0;          // padded size
  int64_t parts = 1;        // copies, one a share of the work
  Buffer<T> sums;           // (parts, row, row)
  bool shared_rows = true;  // parts take shares of the rows; else all rows are packed, and tiles are shared out
};

// Rows shared out: each part packs a few hundred rows at a time, so that panels stay in the second cache, and adds them
// to its own copy. Where the mode's positions are neighbours and few, rows are read in place instead.
template <typename T>
void add_rows(const void* x, ScalarType dtype, const Unfolding& unfolding, Gram<T>& gram) {
  constexpr int64_t packed_elements = 16384;
  constexpr int64_t in_place_columns = 64;
  const int64_t padded = gram.row;
  const bool in_place = dtype == dtype_of<T> && unfolding.column_stride == 1 && unfolding.columns <= in_place_columns &&
                        unfolding.run >= 32;
  const int64_t at_once = std::clamp<int64_t>(packed_elements / padded, 16, 512);
  parallel_for(0, gram.parts, 1, [&](int64_t first, int64_t last) {
    const Buffer<T> panels(in_place ? 0 : at_once * padded);
    for (int64_t part = first; part < last; ++part) {
      T* sums = gram.sums.data() + part * padded * padded;
      const int64_t end = unfolding.rows * (part + 1) / gram.parts;
      int64_t row = unfolding.rows * part / gram.parts;
      while (row < end) {
        int64_t count = std::min(end - row, at_once);
        if (in_place) {
          const int64_t within = row % unfolding.run;
          count = std::min(unfolding.run - within, end - row);
          const int64_t offset = unfolding.offset(row / unfolding.run) + within * unfolding.row_stride;
          const T* data = static_cast<const T*>(offset_by(x, dtype, offset));
          for (int64_t right = 0; right < gram.size; right += gram.width) {
            const int64_t columns = std::min(gram.width, gram.size - right);
            add_panels(data, data + right, count, unfolding.row_stride, right + columns, columns, sums + right, padded);
          }
        } else {
          pack(x, dtype, unfolding, row, count, gram.width, panels.data());
          add_packed(panels.data(), count, gram.size, gram.width, sums, padded);
        }
        row += count;
      }
    }
  });
}

// Tiles shared out, for matrices of which not every thread can have a copy: a stage of rows is packed by all threads,
// then each takes tiles of the one matrix. Scratch: the stage, some megabytes.
template <typename T>
void add_tiles(const void* x, ScalarType dtype, const Unfolding& unfolding, Gram<T>& gram) {
  constexpr int64_t stage_elements = 1 << 20;
  constexpr int64_t piece = 64;
  const int64_t stage = std::clamp<int64_t>(stage_elements / gram.row / piece * piece, piece, 1024);
  const int64_t panels = (gram.size + gram.width - 1) / gram.width;
  const Buffer<T> packed(std::min(stage, (unfolding.rows + piece - 1) / piece * piece) * gram.row);
  for (int64_t begin = 0; begin < unfolding.rows; begin += stage) {
    const int64_t count = std::min(stage, unfolding.rows - begin);
    // (pieces, panel, piece, width): a piece is what pack() makes at a time.
    const int64_t pieces = (count + piece - 1) / piece;
    parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index) {
        const int64_t rows = std::min(piece, count - index * piece);
        pack(x, dtype, unfolding, begin + index * piece, rows, gram.width, packed.data() + index * piece * gram.row);
      }
    });
    parallel_for(0, panels * (panels + 1) / 2, 1, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) {
        int64_t right = 0;
        int64_t left = tile;
        while (left > right) {
          left -= ++right;
        }
        const int64_t left_column = left * gram.width;
        const int64_t right_column = right * gram.width;
        for (int64_t index = 0; index < pieces; ++index) {
          const int64_t rows = std::min(piece, count - index * piece);
          const T* from = packed.data() + index * piece * gram.row;
          add_panels(from + left_column * rows, from + right_column * rows, rows, gram.width,
                     std::min(gram.width, gram.size - left_column), std::min(gram.width, gram.size - right_column),
                     gram.sums.data() + left_column * gram.row + right_column, gram.row);
        }
      }
    });
  }
}

// target (size, size) += the sum of the parts, its lower half from its upper.
template <typename T, typename G>
void hand_over(const Gram<T>& gram, G* target, int64_t row_stride, int64_t column_stride) {
  parallel_for(0, gram.size, 1 + 16384 / gram.size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < gram.size; ++j) {
        const int64_t upper = i < j ? i * gram.row + j : j * gram.row + i;
        T sum = 0;
        for (int64_t part = 0; part < gram.parts; ++part) {
          sum += gram.sums.data()[part * gram.row * gram.row + upper];
        }
        target[i * row_stride + j * column_stride] += static_cast<G>(sum);
      }
    }
  });
}

// Adds the Gram matrices of `modes` of x to `grams`. The entries of the first mode are taken in groups of some
// megabytes, and every mode's rows of a group are added before the next is read, so that x comes from memory once.
template <typename T>
void add_grams(const std::vector<Tensor>& grams, const Tensor& x, const Sizes& modes) {
  constexpr int64_t group_elements = 1 << 19;
  constexpr int64_t small_size = 128;
  const Sizes sizes = sizes_of(x);
  const Sizes strides = strides_of(x);
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<Gram<T>> running;
  for (const int64_t mode : modes) {
    Gram<T> gram;
    gram.mode = mode;
    gram.size = sizes[mode];
    gram.width = panel_width<T>(gram.size);
    gram.row = (gram.size + gram.width - 1) / gram.width * gram.width;
    const int64_t copies = threads * gram.size * gram.size;
    gram.shared_rows = gram.size <= small_size || 4 * copies <= x.numel();
    const int64_t work = x.numel() / 4096 + 1;
    gram.parts = gram.shared_rows ? std::min(threads, work) : 1;
    gram.sums = Buffer<T>(gram.parts * gram.row * gram.row);
    std::fill_n(gram.sums.data(), gram.parts * gram.row * gram.row, T(0));
    running.push_back(std::move(gram));
  }
  const auto add = [&](Gram<T>& gram, const Sizes& some, const void* data) {
    const Unfolding unfolding = unfold(some, strides, gram.mode);
    if (gram.shared_rows) {
      add_rows(data, x.scalar_type(), unfolding, gram);
    } else {
      add_tiles(data, x.scalar_type(), unfolding, gram);
    }
  };
  const int64_t entry = x.numel() / sizes[0];
  const int64_t at_once = std::max<int64_t>(group_elements / entry, 1);
  for (int64_t begin = 0; begin < sizes[0]; begin += at_once) {
    Sizes group = sizes;
    group[0] = std::min(at_once, sizes[0] - begin);
    for (Gram<T>& gram : running) {
      if (gram.mode != 0) {
        add(gram, group, offset_by(x.const_data_ptr(), x.scalar_type(), begin * strides[0]));
      }
    }
  }
  for (size_t index = 0; index < running.size(); ++index) {
    if (running[index].mode == 0) {
      add(running[index], sizes, x.const_data_ptr());
    }
    dispatch_accumulation(grams[index].scalar_type(), [&](auto value) {
      using G = decltype(value);
      hand_over(running[index], grams[index].mutable_data_ptr<G>(), grams[index].stride(0), grams[index].stride(1));
    });
  }
}

void mode_grams_(const std::vector<Tensor>& grams, const Tensor& x, const Sizes& modes) {
  const Sizes wrapped = check_grams(grams, x, modes);
  if (x.numel() == 0 || modes.empty()) {
    return;
  }
  dispatch_accumulation(accumulation_dtype(x.scalar_type()),
                        [&](auto value) { add_grams<decltype(value)>(grams, x, wrapped); });
}

Tensor mode_gram(const Tensor& x, int64_t mode) {
  const int64_t wrapped = check_mode("mode_gram", x, mode);
  const int64_t size = x.size(wrapped);
  Tensor gram = torch::stable::new_zeros(x, {size, size}, accumulation_dtype(x.scalar_type()));
  mode_grams_({gram}, x, {wrapped});
  return gram;
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("mode_gram", TORCH_BOX(&lance::mode_gram));
  m.impl("mode_grams_", TORCH_BOX(&lance::mode_grams_));
}
