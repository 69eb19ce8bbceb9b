// The CPU kernels as Python sees them. The interpreter lock is released while a kernel runs.
#include "bindings.h"

#include "cpu/hot.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "fit.h"
#ifdef TARDKD_CUDA_ARCHITECTURES
#include "cuda/runtime.h"
#endif

using namespace tardkd;

namespace {

void region_distill(const py::object& student_pyramid, const py::object& teacher_pyramid, const py::object& gradient,
                    bool add, const py::object& inputs, const py::object& upstream, const py::object& results,
                    const py::object& align, const py::object& loss, int threads) {
  const Pyramid student = pyramid(student_pyramid, tensor(TARDKD_FIELD(inputs, "student_norms"))),
                teacher = pyramid(teacher_pyramid, tensor(TARDKD_FIELD(inputs, "teacher_norms"))),
                grad = gradient_pyramid(gradient, student);
  const RegionInputs in = region_inputs(inputs, tensor(upstream), student, teacher);
  const RoiAlignSpec roi = align_spec(align);
  const LossSpec spec = loss_spec(loss);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_outputs<A>(results);
    py::gil_scoped_release release;
    cpu::region_distill<A>(student, teacher, grad.levels ? &grad : nullptr, add, in, out, roi, spec, threads);
  });
}

void pooled_distill(const py::object& student_pooled, const py::object& teacher_pooled, const py::object& grad_pooled,
                    const py::object& inputs, const py::object& upstream, const py::object& results,
                    const py::object& loss, int threads) {
  const PooledTensor student = pooled_tensor(tensor(student_pooled), tensor(TARDKD_FIELD(inputs, "student_norms"))),
                     teacher = pooled_tensor(tensor(teacher_pooled), tensor(TARDKD_FIELD(inputs, "teacher_norms"))),
                     grad = pooled_tensor(tensor(grad_pooled));
  const RegionInputs in = region_inputs(inputs, tensor(upstream), -1);
  const LossSpec spec = loss_spec(loss);
  accumulate_as(tensor(student_pooled).dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_outputs<A>(results);
    py::gil_scoped_release release;
    cpu::pooled_distill<A>(student, teacher, grad, in, out, spec, threads);
  });
}

void head_distill(const py::object& inputs, const py::object& upstream, const py::object& results,
                  const py::object& loss, int threads) {
  const RegionInputs in = region_inputs(inputs, tensor(upstream), -1);
  const LossSpec spec = loss_spec(loss);
  accumulate_as(in.student_logits.dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_outputs<A>(results);
    py::gil_scoped_release release;
    cpu::head_distill<A>(in, out, spec, threads);
  });
}

// `proposals` (R, 5), `levels` (R,) or None, `pooled` (R, C, pooled_h, pooled_w).
void roi_align(const py::object& features_pyramid, const py::object& proposals, const py::object& levels,
               const py::object& pooled_object, const py::object& align, int threads) {
  const Pyramid features = pyramid(features_pyramid);
  const Table regions = table(tensor(proposals));
  const GivenLevels given = given_levels(levels, features.levels);
  const Tensor pooled = tensor(pooled_object);
  const RoiAlignSpec spec = align_spec(align);
  accumulate_as(pooled.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::roi_align<A>(features, regions, given, pooled.shape[0], pooled.as<A>(), spec, threads);
  });
}

// `proposals` (R, 5), `levels` (R,) or None, `grad_pooled` (R, C, pooled_h, pooled_w).
void roi_align_backward(const py::object& grad_pyramid, const py::object& proposals, const py::object& levels,
                        const py::object& grad_pooled, const py::object& align, int threads) {
  const Pyramid grad = pyramid(grad_pyramid);
  const Table regions = table(tensor(proposals));
  const GivenLevels given = given_levels(levels, grad.levels);
  const Tensor pooled = tensor(grad_pooled);
  const RoiAlignSpec spec = align_spec(align);
  accumulate_as(pooled.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::roi_align_backward<A>(grad, regions, given, pooled.shape[0], pooled.as<A>(), spec, threads);
  });
}

// `norms` (2 C_1 + ... + 2 C_L,), those of the levels one after the other.
void channel_norms(const py::object& features_pyramid, double epsilon, const py::object& norms_object, int threads) {
  const Pyramid features = pyramid(features_pyramid);
  const Tensor norms = tensor(norms_object);
  accumulate_as(features.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::channel_norms<A>(features, epsilon, norms.as<A>(), threads);
  });
}

// `boxes` (G, 5), `loss` (), `mask_sums` (L,).
void gaussian_feature_loss(const py::object& student_pyramid, const py::object& teacher_pyramid,
                           const py::object& boxes_object, double sigma_squared, const py::object& loss_object,
                           const py::object& mask_sums_object, int threads) {
  const Pyramid student = pyramid(student_pyramid), teacher = pyramid(teacher_pyramid);
  const Tensor boxes = tensor(boxes_object), loss = tensor(loss_object), mask_sums = tensor(mask_sums_object);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::gaussian_feature_loss<A>(student, teacher, table(boxes), boxes.shape[0], sigma_squared, loss.as<A>(),
                                  mask_sums.as<double>(), threads);
  });
}

void gaussian_feature_loss_backward(const py::object& student_pyramid, const py::object& teacher_pyramid,
                                    const py::object& grad_pyramid, const py::object& boxes_object,
                                    double sigma_squared, const py::object& mask_sums_object, double upstream,
                                    int threads) {
  const Pyramid student = pyramid(student_pyramid), teacher = pyramid(teacher_pyramid), grad = pyramid(grad_pyramid);
  const Tensor boxes = tensor(boxes_object), mask_sums = tensor(mask_sums_object);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::gaussian_feature_loss_backward<A>(student, teacher, grad, table(boxes), boxes.shape[0], sigma_squared,
                                           mask_sums.as<double>(), upstream, threads);
  });
}

// `student`, `teacher` (R, 4, bins), `gates` (R,), `region_weights` (R,) or None, `loss` () or (R,), `factor` ().
void distribution_distill_loss(const py::object& student, const py::object& teacher, const py::object& gates,
                               const py::object& region_weights, double temperature, const py::object& reduction,
                               const py::object& loss_object, const py::object& factor_object, int threads) {
  const auto in = distribution_inputs(student, teacher, gates, region_weights, temperature, reduction);
  const Tensor loss = tensor(loss_object), factor = tensor(factor_object);
  accumulate_as(factor.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::distribution_distill_loss<A>(in, loss.as<A>(), factor.as<A>(), threads);
  });
}

// The same, and `upstream` (R,), `grad` (R, 4, bins).
void distribution_distill_loss_backward(const py::object& student, const py::object& teacher, const py::object& gates,
                                        const py::object& region_weights, double temperature,
                                        const py::object& reduction, const py::object& upstream,
                                        const py::object& grad_object, int threads) {
  const auto in = distribution_inputs(student, teacher, gates, region_weights, temperature, reduction);
  const Table given = table(tensor(upstream));
  const Tensor grad = tensor(grad_object);
  accumulate_as(grad.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::distribution_distill_loss_backward<A>(in, given, grad.as<A>(), threads);
  });
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = TARDKD_COMPILER;
  info["cpu_instruction_set"] = cpu::instruction_set();
#ifdef TARDKD_CUDA_ARCHITECTURES
  const int version = cuda::runtime_version();
  info["cuda_runtime"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["cuda_architectures"] = TARDKD_CUDA_ARCHITECTURES;
  info["cuda_devices"] = cuda::device_count();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of tardkd. Arguments are not checked here; call them through tardkd.ops.";
  m.def("build_info", &build_info);
  m.def("fit", &fit);
  py::class_<cpu::Block>(m, "Block", py::buffer_protocol(), "Memory for a large result.")
      .def(py::init<size_t>())
      .def_buffer([](const cpu::Block& block) {
        return py::buffer_info(static_cast<uint8_t*>(block.data()), static_cast<py::ssize_t>(block.bytes()));
      });
  m.def("empty_cache", &cpu::empty_cache);
  m.def("region_distill", &region_distill);
  m.def("pooled_distill", &pooled_distill);
  m.def("head_distill", &head_distill);
  m.def("channel_norms", &channel_norms);
  m.def("roi_align", &roi_align);
  m.def("roi_align_backward", &roi_align_backward);
  m.def("gaussian_feature_loss", &gaussian_feature_loss);
  m.def("gaussian_feature_loss_backward", &gaussian_feature_loss_backward);
  m.def("distribution_distill_loss", &distribution_distill_loss);
  m.def("distribution_distill_loss_backward", &distribution_distill_loss_backward);
#ifdef TARDKD_CUDA_ARCHITECTURES
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels.");
  bind_cuda(cuda);
#endif
}
