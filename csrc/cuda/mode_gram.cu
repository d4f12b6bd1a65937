// Gram matrices of mode-n unfoldings, straight from strided memory.
//
// A block of threads takes one 64 x 64 tile of the upper triangle and one share of the positions of the other modes,
// copies two strips of the unfolding to shared memory, and multiplies them on the matrix units. Shares are fixed by the
// shape and added up in order, so that every run has the same bits. x is taken in groups of some megabytes, all modes
// of a group before the next, so that the second mode finds it in the L2 cache.
#include <cuda_runtime.h>
#include <mma.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "../cpu/mode_gram_checks.h"

namespace lance {
namespace {

namespace wmma = nvcuda::wmma;

// Traits.

constexpr int kTile = 64;
constexpr int kDepth = 32;
constexpr int kThreads = 128;
constexpr int kPad = 8;  // elements behind a row in shared memory, against bank conflicts
constexpr int kLoops = 4;
constexpr int64_t kGroupBytes = 16 << 20;
constexpr int64_t kBlocks = 528;  // that a launch should have, whatever the device

template <typename T>
struct Element {
  using type = T;
};
template <>
struct Element<BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct Element<Half> {
  using type = __half;
};

// The positions of the modes that are summed over, outermost loop first.
struct Positions {
  int64_t count;
  int loops;
  int64_t sizes[kLoops];
  int64_t strides[kLoops];

  __device__ int64_t offset(int64_t position) const {
    int64_t at = 0;
    for (int loop = loops - 1; loop > 0; --loop) {
      at += position % sizes[loop] * strides[loop];
      position /= sizes[loop];
    }
    return loops > 0 ? at + position * strides[0] : 0;
  }
};

// Tiles of the upper triangle are counted row by row.
__host__ __device__ inline int64_t tile_count(int64_t rows) {
  return rows * (rows + 1) / 2;
}

__device__ inline void tile_at(int64_t number, int64_t rows, int64_t& row, int64_t& column) {
  row = 0;
  while (number >= rows - row) {
    number -= rows - row;
    ++row;
  }
  column = row + number;
}

// Kernels.

// Adds left right^T of two strips, 64 x 32 each, to a tile; each of the four warps has a quarter of the tile.
template <typename E, typename Sum>
struct Product;

template <typename E>
struct Product<E, float> {
  static constexpr bool kNarrow = sizeof(E) == 2;
  static constexpr int kStep = kNarrow ? 16 : 8;
  using Operand = std::conditional_t<kNarrow, E, wmma::precision::tf32>;
  using Left = wmma::fragment<wmma::matrix_a, 16, 16, kStep, Operand, wmma::row_major>;
  using Right = wmma::fragment<wmma::matrix_b, 16, 16, kStep, Operand, wmma::col_major>;
  wmma::fragment<wmma::accumulator, 16, 16, kStep, float> sums[2][2];

  // What TF32 drops of a value, as a value of its own: three products make float32 of two.
  template <typename Fragment>
  static __device__ Fragment split(Fragment& high) {
    Fragment low;
    for (int index = 0; index < high.num_elements; ++index) {
      const float value = high.x[index];
      high.x[index] = wmma::__float_to_tf32(value);
      low.x[index] = wmma::__float_to_tf32(value - high.x[index]);
    }
    return low;
  }

  __device__ void start(const float* from, bool more, int warp) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        if (more) {
          wmma::load_matrix_sync(sums[i][j], from + place(i, j, warp), kTile, wmma::mem_row_major);
        } else {
          wmma::fill_fragment(sums[i][j], 0.0f);
        }
      }
    }
  }

  __device__ void add(const E* left, const E* right, int row, int warp) {
    for (int k = 0; k < kDepth; k += kStep) {
      Left a[2];
      Right b[2];
      for (int half = 0; half < 2; ++half) {
        wmma::load_matrix_sync(a[half], left + (warp / 2 * 32 + half * 16) * row + k, row);
        wmma::load_matrix_sync(b[half], right + (warp % 2 * 32 + half * 16) * row + k, row);
      }
      if constexpr (kNarrow) {
        for (int i = 0; i < 2; ++i) {
          for (int j = 0; j < 2; ++j) {
            wmma::mma_sync(sums[i][j], a[i], b[j], sums[i][j]);
          }
        }
      } else {
        Left a_low[2] = {split(a[0]), split(a[1])};
        Right b_low[2] = {split(b[0]), split(b[1])};
        for (int i = 0; i < 2; ++i) {
          for (int j = 0; j < 2; ++j) {
            wmma::mma_sync(sums[i][j], a[i], b_low[j], sums[i][j]);
            wmma::mma_sync(sums[i][j], a_low[i], b[j], sums[i][j]);
            wmma::mma_sync(sums[i][j], a[i], b[j], sums[i][j]);
          }
        }
      }
    }
  }

  __device__ void finish(float* to, int warp) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        wmma::store_matrix_sync(to + place(i, j, warp), sums[i][j], kTile, wmma::mem_row_major);
      }
    }
  }

  static __device__ int place(int i, int j, int warp) {
    return (warp / 2 * 32 + i * 16) * kTile + warp % 2 * 32 + j * 16;
  }
};

// float64 by plain multiplications: a thread has 32 entries of a row.
template <>
struct Product<double, double> {
  double sums[kTile * kTile / kThreads];

  __device__ void start(const double* from, bool more, int) {
    for (int j = 0; j < 32; ++j) {
      sums[j] = more ? from[place(j)] : 0.0;
    }
  }

  __device__ void add(const double* left, const double* right, int row, int) {
    for (int k = 0; k < kDepth; ++k) {
      const double value = left[threadIdx.x / 2 * row + k];
      for (int j = 0; j < 32; ++j) {
        sums[j] += value * right[(threadIdx.x % 2 * 32 + j) * row + k];
      }
    }
  }

  __device__ void finish(double* to, int) {
    for (int j = 0; j < 32; ++j) {
      to[place(j)] = sums[j];
    }
  }

  static __device__ int place(int j) {
    return threadIdx.x / 2 * kTile + threadIdx.x % 2 * 32 + j;
  }
};

// parts (shares, tiles, 64, 64): partial sums of the upper triangle's tiles, kept from the group before if `more`.
template <typename E, typename Sum, bool kRowsContiguous>
__global__ void __launch_bounds__(kThreads)
    add_tiles(const E* x, int64_t size, int64_t stride, Positions positions, Sum* parts, bool more) {
  constexpr int kRow = kDepth + kPad;
  __shared__ __align__(32) E left[kTile * kRow];
  __shared__ __align__(32) E right[kTile * kRow];
  __shared__ int64_t offsets[kDepth];
  const int64_t tile_rows = (size + kTile - 1) / kTile;
  int64_t row, column;
  tile_at(blockIdx.x, tile_rows, row, column);
  const int warp = threadIdx.x / 32;
  const int64_t share = ((positions.count + gridDim.y - 1) / gridDim.y + kDepth - 1) / kDepth * kDepth;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = min(begin + share, positions.count);
  Sum* part = parts + (blockIdx.y * tile_count(tile_rows) + blockIdx.x) * kTile * kTile;
  Product<E, Sum> product;
  product.start(part, more, warp);
  for (int64_t first = begin; first < end; first += kDepth) {
    if (threadIdx.x < kDepth) {
      offsets[threadIdx.x] = first + threadIdx.x < end ? positions.offset(first + threadIdx.x) : -1;
    }
    __syncthreads();
    for (int entry = threadIdx.x; entry < kTile * kDepth; entry += kThreads) {
      // Neighbouring threads read neighbouring memory.
      const int i = kRowsContiguous ? entry % kTile : entry / kDepth;
      const int k = kRowsContiguous ? entry / kTile : entry % kDepth;
      const int64_t offset = offsets[k];
      const int64_t upper = row * kTile + i;
      left[i * kRow + k] = offset >= 0 && upper < size ? x[upper * stride + offset] : E{};
      if (row != column) {
        const int64_t lower = column * kTile + i;
        right[i * kRow + k] = offset >= 0 && lower < size ? x[lower * stride + offset] : E{};
      }
    }
    __syncthreads();
    product.add(left, row == column ? left : right, kRow, warp);
    __syncthreads();
  }
  product.finish(part, warp);
}

// gram += the sum of the shares in order, both triangles from the upper one.
template <typename Sum, typename G>
__global__ void hand_over(const Sum* parts, int64_t shares, int64_t size, G* gram, int64_t row_stride,
                          int64_t column_stride) {
  const int64_t tile_rows = (size + kTile - 1) / kTile;
  int64_t row, column;
  tile_at(blockIdx.x, tile_rows, row, column);
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    const int64_t i = row * kTile + entry / kTile;
    const int64_t j = column * kTile + entry % kTile;
    if (i > j || j >= size) {
      continue;
    }
    Sum sum = 0;
    for (int64_t share = 0; share < shares; ++share) {
      sum += parts[(share * tile_count(tile_rows) + blockIdx.x) * kTile * kTile + entry];
    }
    gram[i * row_stride + j * column_stride] += static_cast<G>(sum);
    if (i != j) {
      gram[j * row_stride + i * column_stride] += static_cast<G>(sum);
    }
  }
}

// Launchers.

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "lance::mode_grams_: ", kernel, " did not start: ", cudaGetErrorString(error));
}

// The modes but `mode`, neighbours merged; `loops` is above kLoops where they do not merge into so few.
Positions positions_of(const Sizes& sizes, const Sizes& strides, int64_t mode, int& loops) {
  Sizes merged_sizes, merged_strides;
  Positions positions{1, 0, {}, {}};
  for (int64_t other = 0; other < static_cast<int64_t>(sizes.size()); ++other) {
    if (other == mode || sizes[other] == 1) {
      continue;
    }
    positions.count *= sizes[other];
    if (!merged_sizes.empty() && merged_strides.back() == sizes[other] * strides[other]) {
      merged_sizes.back() *= sizes[other];
      merged_strides.back() = strides[other];
    } else {
      merged_sizes.push_back(sizes[other]);
      merged_strides.push_back(strides[other]);
    }
  }
  loops = static_cast<int>(merged_sizes.size());
  positions.loops = std::min(loops, kLoops);
  for (int loop = 0; loop < positions.loops; ++loop) {
    positions.sizes[loop] = merged_sizes[loop];
    positions.strides[loop] = merged_strides[loop];
  }
  return positions;
}

struct Running {
  int64_t mode;
  int64_t tiles;
  int64_t shares;
  Tensor parts;
};

template <typename T>
void add_grams(const std::vector<Tensor>& grams, const Tensor& x, const Sizes& modes, cudaStream_t stream) {
  using E = typename Element<T>::type;
  using Sum = accumulation_t<T>;
  const Sizes sizes = sizes_of(x);
  const Sizes strides = strides_of(x);
  const E* data = reinterpret_cast<const E*>(x.const_data_ptr());
  const int64_t entry_bytes = x.numel() / sizes[0] * static_cast<int64_t>(sizeof(T));
  const int64_t at_once = std::min(sizes[0], std::max<int64_t>(kGroupBytes / entry_bytes, 1));
  std::vector<Running> running;
  for (const int64_t mode : modes) {
    const int64_t tile_rows = (sizes[mode] + kTile - 1) / kTile;
    const int64_t tiles = tile_count(tile_rows);
    const int64_t positions = x.numel() / sizes[mode] / (mode == 0 ? 1 : sizes[0]) * (mode == 0 ? 1 : at_once);
    const int64_t shares = std::max<int64_t>(
        1, std::min({(kBlocks + tiles - 1) / tiles, (positions + 8 * kDepth - 1) / (8 * kDepth), int64_t{65535}}));
    const ScalarType dtype = accumulation_dtype(x.scalar_type());
    running.push_back({mode, tiles, shares, torch::stable::new_empty(x, {shares * tiles * kTile * kTile}, dtype)});
  }
  const auto add = [&](const Running& one, const Sizes& some, int64_t begin) {
    int loops = 0;
    const Positions positions = positions_of(some, strides, one.mode, loops);
    const dim3 grid(static_cast<unsigned>(one.tiles), static_cast<unsigned>(one.shares));
    Sum* parts = one.parts.template mutable_data_ptr<Sum>();
    const E* from = data + begin * strides[0];
    if (strides[one.mode] == 1) {
      add_tiles<E, Sum, true>
          <<<grid, kThreads, 0, stream>>>(from, some[one.mode], strides[one.mode], positions, parts, begin > 0);
    } else {
      add_tiles<E, Sum, false>
          <<<grid, kThreads, 0, stream>>>(from, some[one.mode], strides[one.mode], positions, parts, begin > 0);
    }
    check_launch("add_tiles");
  };
  for (int64_t begin = 0; begin < sizes[0]; begin += at_once) {
    Sizes group = sizes;
    group[0] = std::min(at_once, sizes[0] - begin);
    for (const Running& one : running) {
      if (one.mode != 0) {
        add(one, group, begin);
      }
    }
  }
  for (size_t index = 0; index < running.size(); ++index) {
    const Running& one = running[index];
    if (one.mode == 0) {
      add(one, sizes, 0);
    }
    const Tensor& gram = grams[index];
    const Sum* parts = one.parts.template const_data_ptr<Sum>();
    dispatch_accumulation(gram.scalar_type(), [&](auto value) {
      using G = decltype(value);
      hand_over<Sum, G><<<static_cast<unsigned>(one.tiles), kThreads, 0, stream>>>(
          parts, one.shares, sizes[one.mode], gram.mutable_data_ptr<G>(), gram.stride(0), gram.stride(1));
    });
    check_launch("hand_over");
  }
}

// Whether every mode's others merge into the loops that a kernel has.
bool fits(const Tensor& x, const Sizes& modes) {
  const Sizes sizes = sizes_of(x);
  const Sizes strides = strides_of(x);
  return std::all_of(modes.begin(), modes.end(), [&](int64_t mode) {
    int loops = 0;
    positions_of(sizes, strides, mode, loops);
    return loops <= kLoops;
  });
}

void mode_grams_(const std::vector<Tensor>& grams, const Tensor& x, const Sizes& modes) {
  const Sizes wrapped = check_grams(grams, x, modes);
  if (x.numel() == 0 || modes.empty()) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const Tensor dense = fits(x, wrapped) ? x : torch::stable::contiguous(x);
  dispatch_floating(x.scalar_type(), [&](auto value) {
    add_grams<decltype(value)>(grams, dense, wrapped, static_cast<cudaStream_t>(stream));
  });
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

STABLE_TORCH_LIBRARY_IMPL(lance, CUDA, m) {
  m.impl("mode_gram", TORCH_BOX(&lance::mode_gram));
  m.impl("mode_grams_", TORCH_BOX(&lance::mode_grams_));
}
