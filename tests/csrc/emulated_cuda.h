// As much of CUDA as csrc/cuda uses, on the CPU: a thread for each thread of a block, blocks one after the other. A
// fragment of a matrix is held whole by every thread of its warp, which all do the same with it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(bytes)
#define __launch_bounds__(threads)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
};
inline thread_local dim3 threadIdx(0, 0, 0);
inline dim3 blockIdx(0, 0, 0);
inline dim3 gridDim;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() {
  block_barrier->arrive_and_wait();
}

template <typename Kernel>
void emulate(dim3 grid, int threads, const Kernel& kernel) {
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      std::barrier<> barrier(threads);
      block_barrier = &barrier;
      std::vector<std::thread> running;
      for (int thread = 0; thread < threads; ++thread) {
        running.emplace_back([&kernel, thread] {
          threadIdx = dim3(thread, 0, 0);
          kernel();
        });
      }
      for (std::thread& thread : running) {
        thread.join();
      }
    }
  }
}

using __nv_bfloat16 = torch::headeronly::BFloat16;
using __half = torch::headeronly::Half;
using std::min;

struct EmulatedGuard {
  explicit EmulatedGuard(int) {}
};
inline AOTITorchError emulated_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision {
struct tf32 {};
}  // namespace precision
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = rows * columns;
  float x[num_elements];
};

template <typename Use, int M, int N, int K, typename T, typename Layout, typename Value>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& to, const Value* from, int row) {
  for (int i = 0; i < to.rows; ++i) {
    for (int j = 0; j < to.columns; ++j) {
      const int at = std::is_same_v<Layout, col_major> ? j * row + i : i * row + j;
      to.x[i * to.columns + j] = static_cast<float>(from[at]);
    }
  }
}

template <int M, int N, int K, typename T>
void load_matrix_sync(fragment<accumulator, M, N, K, T>& to, const float* from, int row, layout_t) {
  for (int i = 0; i < M; ++i) {
    std::copy_n(from + i * row, N, to.x + i * N);
  }
}

template <int M, int N, int K, typename T>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, T>& from, int row, layout_t) {
  for (int i = 0; i < M; ++i) {
    std::copy_n(from.x + i * N, N, to + i * row);
  }
}

template <typename Fragment>
void fill_fragment(Fragment& fragment, float value) {
  std::fill_n(fragment.x, Fragment::num_elements, value);
}

inline float __float_to_tf32(float value) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + 0x1000U) & 0xffffe000U);
}

template <typename Sum, typename Left, typename Right>
void mma_sync(Sum& to, const Left& left, const Right& right, const Sum& from) {
  for (int i = 0; i < Sum::rows; ++i) {
    for (int j = 0; j < Sum::columns; ++j) {
      float sum = from.x[i * Sum::columns + j];
      for (int k = 0; k < Left::columns; ++k) {
        sum += left.x[i * Left::columns + k] * right.x[k * Right::columns + j];
      }
      to.x[i * Sum::columns + j] = sum;
    }
  }
}

}  // namespace nvcuda::wmma
