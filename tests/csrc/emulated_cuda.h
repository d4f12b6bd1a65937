// As much of CUDA as csrc/cuda uses, on the CPU: a thread for each thread of a block, blocks one after the other. Every
// thread reaches every __syncthreads. A fragment of a matrix is held whole by every thread of its warp, which all do
// the same with it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
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
inline thread_local dim3 blockIdx(0, 0, 0);
inline dim3 gridDim;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() {
  block_barrier->arrive_and_wait();
}

template <typename Kernel>
void emulate(dim3 grid, int threads, const Kernel& kernel) {
  gridDim = grid;
  std::vector<std::thread> running;
  std::barrier<> barrier(threads);
  block_barrier = &barrier;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      threadIdx = dim3(thread, 0, 0);
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          kernel();
          __syncthreads();
        }
      }
    });
  }
  for (std::thread& thread : running) {
    thread.join();
  }
}

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    std::fprintf(stderr, "%p is not aligned to %zu bytes\n", address, bytes);
    std::abort();
  }
}

// Copies arrive at once for every other thread, and only when they are waited for for the rest.
struct EmulatedCopy {
  void* to;
  const void* from;
  size_t bytes;
  size_t zeros;
  int group;
};
inline void copy_now(const EmulatedCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
  std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
}
inline thread_local std::vector<EmulatedCopy> copies;
inline thread_local int committed = 0;
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  if (threadIdx.x % 2 == 0) {
    copies.push_back({to, from, bytes, zeros, committed});
  } else {
    copy_now({to, from, bytes, zeros, committed});
  }
}
inline void __pipeline_commit() {
  ++committed;
}
inline void __pipeline_wait_prior(int later) {
  std::erase_if(copies, [&](const EmulatedCopy& copy) {
    if (copy.group >= committed - later) {
      return false;
    }
    copy_now(copy);
    return true;
  });
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
  using value_type = std::conditional_t<std::is_same_v<T, double>, double, float>;
  value_type x[num_elements];
};

template <typename Use, int M, int N, int K, typename T, typename Layout, typename Value>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& to, const Value* from, int row) {
  check_aligned(from, 32);
  for (int i = 0; i < to.rows; ++i) {
    for (int j = 0; j < to.columns; ++j) {
      const int at = std::is_same_v<Layout, col_major> ? j * row + i : i * row + j;
      to.x[i * to.columns + j] = static_cast<typename fragment<Use, M, N, K, T, Layout>::value_type>(from[at]);
    }
  }
}

template <int M, int N, int K, typename T>
void load_matrix_sync(fragment<accumulator, M, N, K, T>& to, const T* from, int row, layout_t) {
  for (int i = 0; i < M; ++i) {
    std::copy_n(from + i * row, N, to.x + i * N);
  }
}

template <int M, int N, int K, typename T>
void store_matrix_sync(T* to, const fragment<accumulator, M, N, K, T>& from, int row, layout_t) {
  for (int i = 0; i < M; ++i) {
    std::copy_n(from.x + i * N, N, to + i * row);
  }
}

template <typename Fragment>
void fill_fragment(Fragment& fragment, typename Fragment::value_type value) {
  std::fill_n(fragment.x, Fragment::num_elements, value);
}

inline float __float_to_tf32(float value) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + 0x1000U) & 0xffffe000U);
}

template <typename Sum, typename Left, typename Right>
void mma_sync(Sum& to, const Left& left, const Right& right, const Sum& from) {
  for (int i = 0; i < Sum::rows; ++i) {
    for (int j = 0; j < Sum::columns; ++j) {
      typename Sum::value_type sum = from.x[i * Sum::columns + j];
      for (int k = 0; k < Left::columns; ++k) {
        sum += left.x[i * Left::columns + k] * right.x[k * Right::columns + j];
      }
      to.x[i * Sum::columns + j] = sum;
    }
  }
}

}  // namespace nvcuda::wmma
