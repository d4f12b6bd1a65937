// Gram matrices of mode-n unfoldings, straight from strided memory.
//
// A block of threads takes one 64 x 64 tile of the upper triangle and one share of the positions of the other modes,
// copies two strips of the unfolding to shared memory, along whatever is contiguous and the next two while it
// multiplies these, and multiplies them on the matrix units. Shares are fixed by the shape and added up in order, so
// that every run has the same bits. x is taken in groups of some megabytes, all modes of a group before the next, so
// that the second mode finds it in the L2 cache.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <type_traits>

#include "../cpu/mode_gram_checks.h"

namespace lance {
namespace {

namespace wmma = nvcuda::wmma;

// Traits.

constexpr int kTile = 64;
constexpr int kThreads = 128;
constexpr int kLoops = 4;
constexpr int kLoadBytes = 16;
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

// The positions of the modes that are summed over, outermost loop first; loops that are not needed have one entry.
struct Positions {
  int64_t count;
  int64_t sizes[kLoops];
  int64_t strides[kLoops];
  int64_t step[kLoops];  // what a thread moves on by at once, as a number with these sizes as bases
};

// A thread's place among them, moved without divisions.
struct Place {
  int64_t position;
  int64_t indices[kLoops];
  int64_t offset;

  __device__ Place(const Positions& positions, int64_t start) : position(start), offset(0) {
    for (int loop = kLoops - 1; loop > 0; --loop) {
      indices[loop] = start % positions.sizes[loop];
      start /= positions.sizes[loop];
      offset += indices[loop] * positions.strides[loop];
    }
    indices[0] = start;
    offset += start * positions.strides[0];
  }

  __device__ void move(const Positions& positions, int step) {
    position += step;
    offset = 0;
    bool carry = false;
    for (int loop = kLoops - 1; loop >= 0; --loop) {
      indices[loop] += positions.step[loop] + carry;
      carry = loop > 0 && indices[loop] >= positions.sizes[loop];
      indices[loop] -= carry ? positions.sizes[loop] : 0;
      offset += indices[loop] * positions.strides[loop];
    }
  }
};

// 64 rows of the unfolding at kDepth positions in shared memory, in lines along whichever of the two x has contiguous.
template <typename E, bool kRowsContiguous>
struct Strip {
  static constexpr int kDepth = 128 / sizeof(E);
  static constexpr int kLines = kRowsContiguous ? kDepth : kTile;
  static constexpr int kLine = kRowsContiguous ? kTile : kDepth;
  // Against bank conflicts: lines one 16-byte row of a matrix apart, or the rows of a float32 one.
  static constexpr int kPitch = kLine + (kRowsContiguous && sizeof(E) == 4 ? 32 : 16) / static_cast<int>(sizeof(E));
  static constexpr int kElements = kLines * kPitch;

  static __device__ int at(int row, int k) {
    return kRowsContiguous ? k * kPitch + row : row * kPitch + k;
  }
};

// How a block's threads fill strips: each takes kVector elements of a line at once, kAcross of them a line.
template <typename E, bool kRowsContiguous, int kVector>
struct Filling {
  using Lines = Strip<E, kRowsContiguous>;
  static constexpr int kAcross = Lines::kLine / kVector;
  static constexpr int kAtOnce = kThreads / kAcross;
  static constexpr int kStep = kRowsContiguous ? kAtOnce : Lines::kDepth;
  static_assert(kThreads % kAcross == 0 && Lines::kLines % kAtOnce == 0);
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

// Adds left right^T of two strips to a tile on the matrix units; each of the four warps has a quarter of the tile.
template <typename E, typename Sum, bool kRowsContiguous>
struct Product {
  using Lines = Strip<E, kRowsContiguous>;
  static constexpr bool kSplit = sizeof(E) == 4;
  static constexpr int kSide = sizeof(E) == 8 ? 8 : 16;
  static constexpr int kStep = sizeof(E) == 8 ? 4 : sizeof(E) == 4 ? 8 : 16;
  static constexpr int kHalf = kTile / 2;
  static constexpr int kCount = kHalf / kSide;
  using Operand = std::conditional_t<kSplit, wmma::precision::tf32, E>;
  using LeftLayout = std::conditional_t<kRowsContiguous, wmma::col_major, wmma::row_major>;
  using RightLayout = std::conditional_t<kRowsContiguous, wmma::row_major, wmma::col_major>;
  using Left = wmma::fragment<wmma::matrix_a, kSide, kSide, kStep, Operand, LeftLayout>;
  using Right = wmma::fragment<wmma::matrix_b, kSide, kSide, kStep, Operand, RightLayout>;
  wmma::fragment<wmma::accumulator, kSide, kSide, kStep, Sum> sums[kCount][kCount];

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

  __device__ void start(const Sum* from, bool more, int warp) {
    for (int i = 0; i < kCount; ++i) {
      for (int j = 0; j < kCount; ++j) {
        if (more) {
          wmma::load_matrix_sync(sums[i][j], from + place(i, j, warp), kTile, wmma::mem_row_major);
        } else {
          wmma::fill_fragment(sums[i][j], Sum{0});
        }
      }
    }
  }

  __device__ void add(const E* left, const E* right, int warp) {
    for (int k = 0; k < Lines::kDepth; k += kStep) {
      Left a[kCount];
      Right b[kCount];
      for (int index = 0; index < kCount; ++index) {
        wmma::load_matrix_sync(a[index], left + Lines::at(warp / 2 * kHalf + index * kSide, k), Lines::kPitch);
        wmma::load_matrix_sync(b[index], right + Lines::at(warp % 2 * kHalf + index * kSide, k), Lines::kPitch);
      }
      if constexpr (kSplit) {
        Left a_low[kCount] = {split(a[0]), split(a[1])};
        Right b_low[kCount] = {split(b[0]), split(b[1])};
        multiply(a, b_low);
        multiply(a_low, b);
      }
      multiply(a, b);
    }
  }

  __device__ void multiply(const Left (&a)[kCount], const Right (&b)[kCount]) {
    for (int i = 0; i < kCount; ++i) {
      for (int j = 0; j < kCount; ++j) {
        wmma::mma_sync(sums[i][j], a[i], b[j], sums[i][j]);
      }
    }
  }

  __device__ void finish(Sum* to, int warp) {
    for (int i = 0; i < kCount; ++i) {
      for (int j = 0; j < kCount; ++j) {
        wmma::store_matrix_sync(to + place(i, j, warp), sums[i][j], kTile, wmma::mem_row_major);
      }
    }
  }

  static __device__ int place(int i, int j, int warp) {
    return (warp / 2 * kHalf + i * kSide) * kTile + warp % 2 * kHalf + j * kSide;
  }
};

// Copies kVector elements to shared memory, where the pipeline can without passing registers; zeros if not `inside`.
template <int kVector, typename E>
__device__ void copy(E* to, const E* from, const E* x, bool inside) {
  constexpr int kBytes = kVector * sizeof(E);
  if constexpr (kBytes >= 4) {
    __pipeline_memcpy_async(to, inside ? from : x, kBytes, inside ? 0 : kBytes);
  } else {
    *to = inside ? *from : E{};
  }
}

// parts (shares, tiles, 64, 64): partial sums of the upper triangle's tiles, kept from the group before if `more`.
template <typename E, typename Sum, bool kRowsContiguous, int kVector>
__global__ void __launch_bounds__(kThreads)
    add_tiles(const E* x, int64_t size, int64_t stride, Positions positions, Sum* parts, bool more) {
  using Lines = Strip<E, kRowsContiguous>;
  using Fill = Filling<E, kRowsContiguous, kVector>;
  __shared__ __align__(32) E strips[2][2][Lines::kElements];
  const int64_t tile_rows = (size + kTile - 1) / kTile;
  int64_t tile_row, tile_column;
  tile_at(blockIdx.x, tile_rows, tile_row, tile_column);
  const bool both = tile_row != tile_column;
  const int warp = threadIdx.x / 32;
  const int64_t share =
      ((positions.count + gridDim.y - 1) / gridDim.y + Lines::kDepth - 1) / Lines::kDepth * Lines::kDepth;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = min(begin + share, positions.count);
  Sum* part = parts + (blockIdx.y * tile_count(tile_rows) + blockIdx.x) * kTile * kTile;
  Product<E, Sum, kRowsContiguous> product;
  product.start(part, more, warp);

  const int line = threadIdx.x / Fill::kAcross;
  const int across = threadIdx.x % Fill::kAcross * kVector;
  Place place(positions, begin + (kRowsContiguous ? line : across));
  const auto fill = [&](E* left, E* right) {
#pragma unroll 4
    for (int pass = 0; pass < Lines::kLines / Fill::kAtOnce; ++pass) {
      const int at = line + pass * Fill::kAtOnce;
      const int row = kRowsContiguous ? across : at;
      const int to = Lines::at(row, kRowsContiguous ? at : across);
      const int64_t upper = tile_row * kTile + row;
      copy<kVector>(left + to, x + upper * stride + place.offset, x, place.position < end && upper < size);
      if (both) {
        const int64_t lower = tile_column * kTile + row;
        copy<kVector>(right + to, x + lower * stride + place.offset, x, place.position < end && lower < size);
      }
      if (kRowsContiguous) {
        place.move(positions, Fill::kStep);
      }
    }
    if (!kRowsContiguous) {
      place.move(positions, Fill::kStep);
    }
    __pipeline_commit();
  };
  if (begin < end) {
    fill(strips[0][0], strips[0][1]);
  }
  int now = 0;
  for (int64_t first = begin; first < end; first += Lines::kDepth) {
    // All threads are past the strips before these, which the next can therefore replace.
    __pipeline_wait_prior(0);
    __syncthreads();
    if (first + Lines::kDepth < end) {
      fill(strips[1 - now][0], strips[1 - now][1]);
    }
    product.add(strips[now][0], strips[now][both], warp);
    now = 1 - now;
  }
  product.finish(part, warp);
}

// gram += the sum of the shares, both triangles from the upper one. A block has 32 neighbouring entries of a tile; its
// warps take the shares in turn, and their sums are added up in order.
template <typename Sum, typename G>
__global__ void __launch_bounds__(kThreads)
    hand_over(const Sum* parts, int64_t shares, int64_t size, G* gram, int64_t row_stride, int64_t column_stride) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Sum sums[kWarps][32];
  const int64_t tile_rows = (size + kTile - 1) / kTile;
  const int64_t tiles = tile_count(tile_rows);
  int64_t tile_row, tile_column;
  tile_at(blockIdx.x, tile_rows, tile_row, tile_column);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int entry = blockIdx.y * 32 + lane;
  Sum sum = 0;
#pragma unroll 8
  for (int64_t share = warp; share < shares; share += kWarps) {
    sum += parts[(share * tiles + blockIdx.x) * kTile * kTile + entry];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  const int64_t i = tile_row * kTile + entry / kTile;
  const int64_t j = tile_column * kTile + entry % kTile;
  if (warp > 0 || i > j || j >= size) {
    return;
  }
  for (int other = 1; other < kWarps; ++other) {
    sum += sums[other][lane];
  }
  gram[i * row_stride + j * column_stride] += static_cast<G>(sum);
  if (i != j) {
    gram[j * row_stride + i * column_stride] += static_cast<G>(sum);
  }
}

// Launchers.

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "lance::mode_grams_: ", kernel, " did not start: ", cudaGetErrorString(error));
}

// The modes but `mode`, the widest stride outermost and what lies without gaps merged; `loops` is above kLoops where
// they do not merge into so few.
Positions positions_of(const Sizes& sizes, const Sizes& strides, int64_t mode, int& loops) {
  Sizes order;
  Positions positions{1, {}, {}, {}};
  for (int64_t other = 0; other < static_cast<int64_t>(sizes.size()); ++other) {
    if (other != mode && sizes[other] != 1) {
      order.push_back(other);
      positions.count *= sizes[other];
    }
  }
  // Expanded modes, stride 0, outermost of all: what is contiguous is to be innermost.
  std::stable_sort(order.begin(), order.end(), [&](int64_t left, int64_t right) {
    return strides[left] == 0 ? strides[right] != 0 : strides[right] != 0 && strides[left] > strides[right];
  });
  Sizes merged_sizes, merged_strides;
  for (const int64_t other : order) {
    if (!merged_sizes.empty() && merged_strides.back() == sizes[other] * strides[other]) {
      merged_sizes.back() *= sizes[other];
      merged_strides.back() = strides[other];
    } else {
      merged_sizes.push_back(sizes[other]);
      merged_strides.push_back(strides[other]);
    }
  }
  loops = static_cast<int>(merged_sizes.size());
  for (int loop = 0; loop < kLoops; ++loop) {
    const int merged = loops - kLoops + loop;
    positions.sizes[loop] = merged < 0 ? 1 : merged_sizes[merged];
    positions.strides[loop] = merged < 0 ? 0 : merged_strides[merged];
  }
  return positions;
}

// Elements that one load can take: they divide what is contiguous, and every line of it starts at a multiple of them.
int vector_of(const void* x, int element_bytes, int64_t size, int64_t stride, const Positions& positions) {
  const bool rows_contiguous = stride == 1;
  const int64_t line = rows_contiguous ? size : positions.sizes[kLoops - 1];
  if (!rows_contiguous && positions.strides[kLoops - 1] != 1) {
    return 1;
  }
  const auto starts_at_multiples = [&](int vector) {
    bool starts = reinterpret_cast<uintptr_t>(x) % (vector * element_bytes) == 0 && line % vector == 0;
    starts = starts && (rows_contiguous || stride % vector == 0 || size == 1);
    for (int loop = 0; loop < kLoops - (rows_contiguous ? 0 : 1); ++loop) {
      starts = starts && positions.strides[loop] % vector == 0;
    }
    return starts;
  };
  int vector = kLoadBytes / element_bytes;
  while (vector > 1 && !starts_at_multiples(vector)) {
    vector /= 2;
  }
  return vector;
}

template <typename E, typename Sum, bool kRowsContiguous, int kVector = kLoadBytes / sizeof(E)>
void launch(int vector, dim3 grid, cudaStream_t stream, const E* x, int64_t size, int64_t stride, Positions positions,
            Sum* parts, bool more) {
  if constexpr (kVector > 1) {
    if (vector < kVector) {
      launch<E, Sum, kRowsContiguous, kVector / 2>(vector, grid, stream, x, size, stride, positions, parts, more);
      return;
    }
  }
  int64_t step = Filling<E, kRowsContiguous, kVector>::kStep;
  for (int loop = kLoops - 1; loop > 0; --loop) {
    positions.step[loop] = step % positions.sizes[loop];
    step /= positions.sizes[loop];
  }
  positions.step[0] = step;
  add_tiles<E, Sum, kRowsContiguous, kVector><<<grid, kThreads, 0, stream>>>(x, size, stride, positions, parts, more);
  check_launch("add_tiles");
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
  constexpr int64_t kShare = 4 * Strip<E, false>::kDepth;  // positions that a block is worth starting for
  std::vector<Running> running;
  for (const int64_t mode : modes) {
    const int64_t tile_rows = (sizes[mode] + kTile - 1) / kTile;
    const int64_t tiles = tile_count(tile_rows);
    const int64_t positions = x.numel() / sizes[mode] / (mode == 0 ? 1 : sizes[0]) * (mode == 0 ? 1 : at_once);
    const int64_t shares = std::max<int64_t>(
        1, std::min({(kBlocks + tiles - 1) / tiles, (positions + kShare - 1) / kShare, int64_t{65535}}));
    const ScalarType dtype = accumulation_dtype(x.scalar_type());
    running.push_back({mode, tiles, shares, torch::stable::new_empty(x, {shares * tiles * kTile * kTile}, dtype)});
  }
  const auto add = [&](const Running& one, const Sizes& some, int64_t begin) {
    int loops = 0;
    const Positions positions = positions_of(some, strides, one.mode, loops);
    const dim3 grid(static_cast<unsigned>(one.tiles), static_cast<unsigned>(one.shares));
    Sum* parts = one.parts.template mutable_data_ptr<Sum>();
    const E* from = data + begin * strides[0];
    const int64_t stride = strides[one.mode];
    const int vector = vector_of(from, sizeof(E), some[one.mode], stride, positions);
    if (stride == 1) {
      launch<E, Sum, true>(vector, grid, stream, from, some[one.mode], stride, positions, parts, begin > 0);
    } else {
      launch<E, Sum, false>(vector, grid, stream, from, some[one.mode], stride, positions, parts, begin > 0);
    }
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
    const dim3 grid(static_cast<unsigned>(one.tiles), kTile * kTile / 32);
    dispatch_accumulation(gram.scalar_type(), [&](auto value) {
      using G = decltype(value);
      hand_over<Sum, G><<<grid, kThreads, 0, stream>>>(parts, one.shares, sizes[one.mode], gram.mutable_data_ptr<G>(),
                                                       gram.stride(0), gram.stride(1));
    });
    check_launch("hand_over");
  }
}

// Whether every mode's others merge into the loops that a kernel has, in a group of x too: fewer entries of mode 0 may
// leave a gap to the mode around it.
bool fits(const Tensor& x, const Sizes& modes) {
  const Sizes sizes = sizes_of(x);
  const Sizes strides = strides_of(x);
  Sizes group = sizes;
  group[0] = std::max<int64_t>(sizes[0] - 1, 1);
  return std::all_of(modes.begin(), modes.end(), [&](int64_t mode) {
    int loops = 0;
    int group_loops = 0;
    positions_of(sizes, strides, mode, loops);
    positions_of(group, strides, mode, group_loops);
    return std::max(loops, group_loops) <= kLoops;
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
