// The CUDA kernels as Python sees them: every function launches on the stream of `target` and returns at once. Made for
// CudaKernels in tardkd/ops/cuda.py, which also allocates the scratch memory.
#include "bindings.h"
#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace tardkd {
namespace {

cuda::Target target_of(const py::object& target) {
  return cuda::Target{TARDKD_FIELD(target, "device").cast<int32_t>(),
                      reinterpret_cast<void*>(TARDKD_FIELD(target, "stream").cast<uintptr_t>())};
}

template <class T>
cuda::Scratch<T> scratch_of(const py::object& scratch) {
  const Tensor memory = tensor_unannounced(TARDKD_FIELD(scratch, "memory"));
  const Tensor done = part(memory, 0, 1), partial = part(memory, 1, memory.shape[0] - 1);
  return cuda::Scratch<T>{partial.as<T>(), done.as<int32_t>()};
}

// Calls launch(), without the interpreter's lock: a full queue makes a launch wait.
template <class F>
void run(const F& launch) {
  cuda::Status status;
  {
    py::gil_scoped_release release;
    status = launch();
  }
  if (status.error)
    throw std::runtime_error(std::string("tardkd: CUDA kernel ") + status.kernel + ": " +
                             cuda::error_text(status.error));
}

void region_distill(const py::object& student_pyramid, const py::object& teacher_pyramid, const py::object& inputs,
                    const py::object& upstream, const py::object& results, const py::object& scratch,
                    const py::object& align, const py::object& loss, const py::object& target) {
  const Pyramid student = pyramid(student_pyramid, tensor(TARDKD_FIELD(inputs, "student_norms"))),
                teacher = pyramid(teacher_pyramid, tensor(TARDKD_FIELD(inputs, "teacher_norms")));
  const Tensor grad_pooled = tensor(TARDKD_FIELD(results, "grad_features"));
  const RegionInputs in = region_inputs(inputs, tensor(upstream), student, teacher);
  const RoiAlignSpec roi = align_spec(align);
  const LossSpec spec = loss_spec(loss);
  const cuda::Target at = target_of(target);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_outputs<A>(results);
    const auto space = scratch_of<A>(scratch);
    run([&] { return cuda::region_distill<A>(student, teacher, grad_pooled.as<A>(), in, out, space, roi, spec, at); });
  });
}

void pooled_distill(const py::object& student_pooled, const py::object& teacher_pooled, const py::object& grad_pooled,
                    const py::object& inputs, const py::object& upstream, const py::object& results,
                    const py::object& scratch, const py::object& loss, const py::object& target) {
  const PooledTensor student = pooled_tensor(tensor(student_pooled), tensor(TARDKD_FIELD(inputs, "student_norms"))),
                     teacher = pooled_tensor(tensor(teacher_pooled), tensor(TARDKD_FIELD(inputs, "teacher_norms"))),
                     grad = pooled_tensor(tensor(grad_pooled));
  const RegionInputs in = region_inputs(inputs, tensor(upstream), -1);
  const LossSpec spec = loss_spec(loss);
  const cuda::Target at = target_of(target);
  accumulate_as(tensor(student_pooled).dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_outputs<A>(results);
    const auto space = scratch_of<A>(scratch);
    run([&] { return cuda::pooled_distill<A>(student, teacher, grad, in, out, space, spec, at); });
  });
}

void head_distill(const py::object& inputs, const py::object& upstream, const py::object& results,
                  const py::object& scratch, const py::object& loss, const py::object& target) {
  const RegionInputs in = region_inputs(inputs, tensor(upstream), -1);
  const LossSpec spec = loss_spec(loss);
  const cuda::Target at = target_of(target);
  accumulate_as(in.student_logits.dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_outputs<A>(results);
    const auto space = scratch_of<A>(scratch);
    run([&] { return cuda::head_distill<A>(in, out, space, spec, at); });
  });
}

// `proposals` (R, 5), `levels` (R,) or None, `pooled` (R, C, pooled_h, pooled_w).
void roi_align(const py::object& features_pyramid, const py::object& proposals, const py::object& levels,
               const py::object& pooled_object, const py::object& align, const py::object& target) {
  const Pyramid features = pyramid(features_pyramid);
  const Table regions = table(tensor(proposals));
  const GivenLevels given = given_levels(levels, features.levels);
  const Tensor pooled = tensor(pooled_object);
  const RoiAlignSpec spec = align_spec(align);
  const cuda::Target at = target_of(target);
  run([&] { return cuda::roi_align(features, regions, given, pooled.shape[0], pooled.data, spec, at); });
}

int64_t gather_plan(const py::object& grad_pyramid, int64_t regions, const py::object& align) {
  const Pyramid grad = pyramid(grad_pyramid);
  return grad.dtype == DType::float64 ? cuda::gather_plan<double>(grad, regions, align_spec(align))
                                      : cuda::gather_plan<float>(grad, regions, align_spec(align));
}

// `proposals` (R, 5), `levels` (R,) or None, `gates` (R, 3) or None, `packed` as region_distill leaves it, `loose` (R,
// C, pooled_h, pooled_w) or None, `factor` () or None, `plan` (gather_plan(),).
void roi_align_gather(const py::object& grad_pyramid, bool add, const py::object& proposals, const py::object& levels,
                      const py::object& gates, const py::object& packed_object, const py::object& loose_object,
                      const py::object& factor_object, const py::object& plan_object, const py::object& align,
                      const py::object& target) {
  const Pyramid grad = pyramid(grad_pyramid);
  const Tensor regions = tensor(proposals), open = tensor(gates), packed = tensor(packed_object),
               loose = tensor(loose_object), factor = tensor(factor_object), plan = tensor(plan_object);
  const GivenLevels given = given_levels(levels, grad.levels);
  const RoiAlignSpec spec = align_spec(align);
  const cuda::Target at = target_of(target);
  accumulate_as(grad.dtype, [&](auto a) {
    using A = decltype(a);
    const cuda::PooledGradient<A> pooled{packed.as<A>(), loose.data, loose.dtype};
    run([&] {
      return cuda::roi_align_gather<A>(grad, add, table(regions), given, regions.shape[0], open.as<const bool>(),
                                       pooled, factor.as<const A>(), plan.as<A>(), spec, at);
    });
  });
}

// results[k] = gradients[k] * upstream[k] * factors[terms[k]]; of a negative term without a factor. `gradients` and
// `factors` are contiguous and of the accumulation type, `upstream` are single elements.
void scale_gradients(const std::vector<py::object>& results, const std::vector<py::object>& gradients,
                     const py::object& factors, const std::vector<py::object>& upstream,
                     const std::vector<int64_t>& terms, const py::object& target) {
  const Tensor factor = tensor(factors);
  std::vector<cuda::Scaling> scalings;
  for (size_t k = 0; k < results.size(); ++k) {
    const Tensor to = tensor(results[k]), from = tensor(gradients[k]), by = tensor(upstream[k]);
    int64_t count = 1;
    for (int axis = 0; axis < from.axes; ++axis) count *= from.shape[axis];
    const char* const own = terms[k] < 0 ? nullptr : factor.as<char>() + terms[k] * factor.bytes;
    if (count) scalings.push_back({to.data, to.dtype, from.data, count, by.data, own});
  }
  const cuda::Target at = target_of(target);
  accumulate_as(factor.dtype, [&](auto a) {
    run([&] { return cuda::scale_gradients<decltype(a)>(scalings.data(), int(scalings.size()), at); });
  });
}

int64_t gaussian_partials(const py::object& student_pyramid) {
  return cuda::gaussian_partials(pyramid(student_pyramid));
}

// `boxes` (G, 5), `mask_sums` (L,), `loss` ().
void gaussian_feature_loss(const py::object& student_pyramid, const py::object& teacher_pyramid,
                           const py::object& boxes_object, double sigma_squared, const py::object& scratch,
                           const py::object& mask_sums_object, const py::object& loss_object,
                           const py::object& target) {
  const Pyramid student = pyramid(student_pyramid), teacher = pyramid(teacher_pyramid);
  const Tensor boxes = tensor(boxes_object), mask_sums = tensor(mask_sums_object), loss = tensor(loss_object);
  const auto space = scratch_of<double>(scratch);
  const cuda::Target at = target_of(target);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    run([&] {
      return cuda::gaussian_feature_loss<A>(student, teacher, table(boxes), boxes.shape[0], sigma_squared, space,
                                            mask_sums.as<double>(), loss.as<A>(), at);
    });
  });
}

void gaussian_feature_loss_backward(const py::object& student_pyramid, const py::object& teacher_pyramid,
                                    const py::object& grad_pyramid, const py::object& boxes_object,
                                    double sigma_squared, const py::object& mask_sums_object,
                                    const py::object& upstream_object, const py::object& target) {
  const Pyramid student = pyramid(student_pyramid), teacher = pyramid(teacher_pyramid), grad = pyramid(grad_pyramid);
  const Tensor boxes = tensor(boxes_object), mask_sums = tensor(mask_sums_object), upstream = tensor(upstream_object);
  const cuda::Target at = target_of(target);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    run([&] {
      return cuda::gaussian_feature_loss_backward<A>(student, teacher, grad, table(boxes), boxes.shape[0],
                                                     sigma_squared, mask_sums.as<const double>(),
                                                     upstream.as<const A>(), at);
    });
  });
}

// `student`, `teacher` (R, 4, bins), `gates` (R,), `region_weights` (R,) or None, `loss` () or (R,), `factor` ().
void distribution_distill_loss(const py::object& student, const py::object& teacher, const py::object& gates,
                               const py::object& region_weights, double temperature, const py::object& reduction,
                               const py::object& scratch, const py::object& loss_object,
                               const py::object& factor_object, const py::object& target) {
  const auto in = distribution_inputs(student, teacher, gates, region_weights, temperature, reduction);
  const Tensor loss = tensor(loss_object), factor = tensor(factor_object);
  const cuda::Target at = target_of(target);
  accumulate_as(factor.dtype, [&](auto a) {
    using A = decltype(a);
    const auto space = scratch_of<A>(scratch);
    run([&] { return cuda::distribution_distill_loss<A>(in, space, loss.as<A>(), factor.as<A>(), at); });
  });
}

// The same, and `upstream` (R,), `grad` (R, 4, bins).
void distribution_distill_loss_backward(const py::object& student, const py::object& teacher, const py::object& gates,
                                        const py::object& region_weights, double temperature,
                                        const py::object& reduction, const py::object& upstream,
                                        const py::object& grad_object, const py::object& target) {
  const auto in = distribution_inputs(student, teacher, gates, region_weights, temperature, reduction);
  const Table given = table(tensor(upstream));
  const Tensor grad = tensor(grad_object);
  const cuda::Target at = target_of(target);
  accumulate_as(grad.dtype, [&](auto a) {
    using A = decltype(a);
    run([&] { return cuda::distribution_distill_loss_backward<A>(in, given, grad.as<A>(), at); });
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("problem_of", &cuda::problem_of);
  m.def("region_partials", &cuda::region_partials);
  m.def("region_distill", &region_distill);
  m.def("pooled_distill", &pooled_distill);
  m.def("head_distill", &head_distill);
  m.def("roi_align", &roi_align);
  m.def("gather_plan", &gather_plan);
  m.def("roi_align_gather", &roi_align_gather);
  m.def("scale_gradients", &scale_gradients);
  m.def("gaussian_partials", &gaussian_partials);
  m.def("gaussian_feature_loss", &gaussian_feature_loss);
  m.def("gaussian_feature_loss_backward", &gaussian_feature_loss_backward);
  m.def("distribution_distill_loss", &distribution_distill_loss);
  m.def("distribution_distill_loss_backward", &distribution_distill_loss_backward);
}

}  // namespace tardkd
