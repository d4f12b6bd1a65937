#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "shifted.h"
#include "tucker.h"

namespace lance {
namespace {

// aten::convolution_backward, for the weight alone; `weight` gives its size.
Tensor library_weight_grad(const Tensor& grad_output, const Tensor& image, const Tensor& weight, const Sizes& stride,
                           const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Sizes output_padding(stride.size(), 0);
  const std::array<int32_t, 3> wanted{0, 1, 0};
  std::array<AtenTensorHandle, 3> gradients{};
  const int64_t count = static_cast<int64_t>(stride.size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      grad_output.get(), image.get(), weight.get(), nullptr, 0, stride.data(), count, padding.data(), count,
      dilation.data(), count, 0, output_padding.data(), count, groups, wanted.data(), 3, &gradients[0], &gradients[1],
      &gradients[2]));
  for (const size_t unwanted : {0, 2}) {
    if (gradients[unwanted] != nullptr) {
      aoti_torch_delete_tensor_object(gradients[unwanted]);
    }
  }
  return Tensor(gradients[1]);
}

// In the vector operations of Shifted::cost(): the library's products, which fill vectors badly where a group has few
// channels, its passes over what it reorders, and making the image.
template <typename T>
double expanded_cost(const Problem& problem) {
  const double lanes = static_cast<double>(routines().vector_bytes) / sizeof(T);
  const double grad = static_cast<double>(problem.kept * problem.outputs * count_of(problem.positions));
  const double image = static_cast<double>(problem.kept * problem.rank * count_of(problem.input));
  const bool grouped = problem.channels_expanded && problem.groups > 1;
  const double channels = static_cast<double>(std::max<int64_t>(problem.sum_channels(), grouped ? 32 : 8));
  const double products = grad * static_cast<double>(problem.tap_count) * channels / lanes * 1.6;
  const double making = image * (static_cast<double>(problem.core_ranks[0]) / lanes + 0.5);
  return products + grad / 2 + making + 5e4;
}

// The expanded way: the spatial modes of the core are expanded, and the library takes the weight gradient on `rank`
// channels. Scratch: the expanded core, rank / C of x, and for 16-bit dtypes a quarter of grad_output.
template <typename T>
void run_expanded(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
                  const Geometry& geometry, const Tensor* feature, Tensor& grad_weight) {
  const int64_t spatial = static_cast<int64_t>(problem.taps.size());
  bool library_pads = geometry.padding_mode == "zeros";
  Sizes padding;
  for (size_t mode = 0; mode < problem.taps.size(); ++mode) {
    const auto [before, after] = geometry.pads(mode);
    library_pads = library_pads && before == after;
    padding.push_back(before);
  }
  Matrices<T> expand(2);
  for (size_t mode = 0; mode < problem.taps.size(); ++mode) {
    const std::optional<Tensor>& factor = factors[2 + mode];
    if (!library_pads) {
      expand.emplace_back(expanding_padded<T>(
          factor, factor ? factor->size(0) : core.size(2 + static_cast<int64_t>(mode)), geometry, mode));
    } else {
      expand.push_back(factor ? std::optional(expanding<T>(*factor)) : std::nullopt);
    }
  }
  const Tensor image = multiply_modes(core, std::move(expand), dtype_of<T>);
  Tensor grad = grad_output;
  if (factors[0]) {
    Matrices<T> project(static_cast<size_t>(spatial) + 2);
    project[0] = projecting<T>(*factors[0]);
    grad = multiply_modes(grad_output, std::move(project), dtype_of<T>);
  }
  const int64_t channels = problem.sum_channels();
  Sizes thin_size{problem.outputs, channels};
  thin_size.insert(thin_size.end(), problem.taps.begin(), problem.taps.end());
  const Tensor weight = torch::stable::new_empty(image, thin_size);
  const Sizes no_padding(problem.taps.size(), 0);
  const bool converts = grad.scalar_type() != dtype_of<T>;
  const int64_t at_once = converts ? std::max<int64_t>(problem.kept / 4, 1) : problem.kept;
  std::optional<Tensor> thin;
  for (int64_t entry = 0; entry < problem.kept; entry += at_once) {
    const int64_t count = std::min(at_once, problem.kept - entry);
    Tensor every_image = image;
    const Tensor part = library_weight_grad(
        torch::stable::to(torch::stable::narrow(grad, 0, entry, count), dtype_of<T>),
        torch::stable::narrow(every_image, 0, entry, count), weight, geometry.stride,
        library_pads ? padding : no_padding, geometry.dilation, problem.channels_expanded ? geometry.groups : 1);
    thin = thin ? torch::stable::subtract(*thin, part, -1.0) : part;
  }
  const Tensor sums = torch::stable::contiguous(*thin);
  SumsLayout layout{channels * problem.tap_count, problem.tap_count, {}};
  for (int64_t tap = 0; tap < problem.tap_count; ++tap) {
    layout.offsets.push_back(tap);
  }
  std::optional<Matrix<T>> matrix;
  if (feature != nullptr) {
    matrix = expanding<T>(*feature);
  }
  parallel_for(0, problem.outputs, 8, [&](int64_t begin, int64_t end) {
    expand_channels(problem, sums.const_data_ptr<T>() + begin * layout.output, layout, end - begin, begin,
                    matrix ? &*matrix : nullptr, grad_weight);
  });
}

template <typename T>
void run(const Problem& problem, const Tensor& grad_output, const Tensor& core, const Factors& factors,
         const Geometry& geometry, const Tensor* feature, Tensor& grad_weight) {
  const Shifted<T> whole(problem, grad_output, core, factors, geometry, {});
  std::optional<Shifted<T>> selected;
  Sizes lengths = first_lengths<T>(problem, core);
  if (!lengths.empty()) {
    selected.emplace(problem, grad_output, core, factors, geometry, std::move(lengths));
  }
  const double whole_cost = whole.cost();
  const double shifted_cost = selected ? std::min(selected->cost(), whole_cost) : whole_cost;
  const double expanded = expanded_cost<T>(problem);
  if (Depthwise<T>::fits(problem, factors)) {
    const Depthwise<T> depthwise(problem, grad_output, core, factors, geometry);
    if (depthwise.cost() < std::min(shifted_cost, expanded)) {
      depthwise.run(grad_weight);
      return;
    }
  }
  if (expanded < shifted_cost) {
    run_expanded<T>(problem, grad_output, core, factors, geometry, feature, grad_weight);
  } else {
    (shifted_cost < whole_cost ? *selected : whole).run(feature, grad_weight);
  }
}

Tensor convolution_weight_grad(const Tensor& grad_output, const Tensor& core, const Factors& factors,
                               const Sizes& weight_size, const Sizes& stride, const Sizes& padding,
                               const Sizes& dilation, int64_t groups, const std::string& padding_mode) {
  constexpr const char* operation = "convolution_weight_grad";
  const Geometry geometry{stride, padding, dilation, groups, padding_mode};
  check_factors(operation, "core", core, factors, 1);
  Sizes input_size = sizes_of(core);
  for (size_t mode = 0; mode < factors.size(); ++mode) {
    input_size[mode] = factors[mode] ? factors[mode]->size(0) : input_size[mode];
  }
  const Sizes expected = check_geometry(operation, input_size, weight_size, geometry);
  check(sizes_of(grad_output) == expected, "lance::", operation, ": grad_output has shape ", shape_string(grad_output),
        "; expected ", shape_string(expected), " for an input of size ", shape_string(input_size), " and weight_size ",
        shape_string(weight_size));
  check_same(operation, grad_output, "core", core);

  Tensor grad_weight = torch::stable::new_empty(grad_output, weight_size);
  if (grad_weight.numel() == 0) {
    return grad_weight;
  }
  if (grad_output.numel() == 0 || core.numel() == 0) {
    return torch::stable::zero_(grad_weight);
  }
  Problem problem;
  problem.samples = grad_output.size(0);
  problem.kept = core.size(0);
  problem.outputs = weight_size[0];
  problem.groups = groups;
  problem.group_channels = weight_size[1];
  problem.channels_expanded = !factors[1] || core.size(1) > weight_size[1];
  problem.rank = problem.channels_expanded ? input_size[1] : core.size(1);
  problem.input.assign(input_size.begin() + 2, input_size.end());
  problem.taps.assign(weight_size.begin() + 2, weight_size.end());
  problem.positions.assign(expected.begin() + 2, expected.end());
  const Sizes core_size = sizes_of(core);
  problem.core_ranks.assign(core_size.begin() + 2, core_size.end());
  problem.tap_count = count_of(problem.taps);
  problem.rank_count = count_of(problem.core_ranks);
  dispatch_accumulation(accumulation_dtype(core.scalar_type()), [&](auto value) {
    using T = decltype(value);
    if (problem.channels_expanded && factors[1]) {
      Matrices<T> matrices(core_size.size());
      matrices[1] = expanding<T>(*factors[1]);
      const Tensor wide = multiply_modes(core, std::move(matrices), dtype_of<T>);
      run<T>(problem, grad_output, wide, factors, geometry, nullptr, grad_weight);
    } else {
      run<T>(problem, grad_output, core, factors, geometry, factors[1] ? &*factors[1] : nullptr, grad_weight);
    }
  });
  return grad_weight;
}

}  // namespace
}  // namespace lance

STABLE_TORCH_LIBRARY_IMPL(lance, CPU, m) {
  m.impl("convolution_weight_grad", TORCH_BOX(&lance::convolution_weight_grad));
}
