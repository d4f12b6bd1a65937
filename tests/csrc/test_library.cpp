// Calls the operator library as C++ does, through the dispatcher, without Python: defines the schemas the package
// defines in Python, and compares tucker_project with a sum written out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <optional>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern "C" const char* lance_cpu_capability();

STABLE_TORCH_LIBRARY(lance, m) {
  m.def("tucker_project(Tensor x, Tensor?[] factors) -> Tensor");
}

namespace {

Tensor random_tensor(const std::vector<int64_t>& sizes, uint32_t seed) {
  Tensor tensor = torch::stable::empty(sizes, ScalarType::Float);
  float* data = tensor.mutable_data_ptr<float>();
  for (int64_t index = 0; index < tensor.numel(); ++index) {
    seed = seed * 1664525u + 1013904223u;
    data[index] = static_cast<float>(seed >> 8) / (1 << 24) - 0.5f;
  }
  return tensor;
}

Tensor tucker_project(const Tensor& x, const std::vector<std::optional<Tensor>>& factors) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(factors)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lance::tucker_project", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Largest difference to core[b, p, q] = sum over i and j of x[b, i, j] left[i, p] right[j, q].
double largest_error(int64_t batch, int64_t rows, int64_t columns, int64_t left_rank, int64_t right_rank) {
  const Tensor x = random_tensor({batch, rows, columns}, 1);
  const Tensor left = random_tensor({rows, left_rank}, 2);
  const Tensor right = random_tensor({columns, right_rank}, 3);
  const Tensor core = tucker_project(x, {std::nullopt, left, right});
  double largest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t p = 0; p < left_rank; ++p) {
      for (int64_t q = 0; q < right_rank; ++q) {
        double sum = 0;
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            sum += static_cast<double>(x.const_data_ptr<float>()[(b * rows + i) * columns + j]) *
                   left.const_data_ptr<float>()[i * left_rank + p] * right.const_data_ptr<float>()[j * right_rank + q];
          }
        }
        const double error = std::abs(sum - core.const_data_ptr<float>()[(b * left_rank + p) * right_rank + q]);
        largest = std::isnan(error) ? INFINITY : std::max(largest, error);
      }
    }
  }
  return largest;
}

}  // namespace

int main() {
  std::printf("capability %s\n", lance_cpu_capability());
  int failures = 0;
  for (const auto& [batch, rows, columns, left_rank, right_rank] : std::vector<std::array<int64_t, 5>>{
           {2, 7, 5, 3, 2}, {3, 33, 17, 9, 16}, {1, 64, 49, 16, 1}, {4, 1, 1, 1, 1}, {2, 50, 40, 50, 40}}) {
    const double error = largest_error(batch, rows, columns, left_rank, right_rank);
    const bool passed = error < 1e-4;
    failures += !passed;
    std::printf("tucker_project (%ld, %ld, %ld) to (%ld, %ld): error %.1e %s\n", static_cast<long>(batch),
                static_cast<long>(rows), static_cast<long>(columns), static_cast<long>(left_rank),
                static_cast<long>(right_rank), error, passed ? "passed" : "FAILED");
  }
  return failures ? 1 : 0;
}
