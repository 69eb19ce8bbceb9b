// The CPU kernels as Python sees them. The interpreter lock is released while a kernel runs.
#include "bindings.h"

#include "cpu/hot.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#ifdef TARDKD_CUDA_ARCHITECTURES
#include "cuda/runtime.h"
#endif

using namespace tardkd;

namespace {

// regions = (proposals, student_logits, teacher_logits, student_deltas, teacher_deltas, labels, gt_boxes,
//            region_weights | None, upstream | None); all contiguous, boxes float64, the rest of type A.
template <class A>
RegionInputs<A> region_inputs(const py::tuple& regions, int32_t images) {
  const Tensor proposals = tensor(regions[0]), student_logits = tensor(regions[1]), student_deltas = tensor(regions[3]),
               teacher_deltas = tensor(regions[4]);
  RegionInputs<A> in{};
  in.regions = proposals.shape[0];
  in.images = images;
  in.logit_columns = static_cast<int32_t>(student_logits.shape[1]);
  in.student_delta_columns = static_cast<int32_t>(student_deltas.shape[1]);
  in.teacher_delta_columns = static_cast<int32_t>(teacher_deltas.shape[1]);
  in.proposals = proposals.as<const double>();
  in.student_logits = student_logits.as<const A>();
  in.teacher_logits = tensor(regions[2]).as<const A>();
  in.student_deltas = student_deltas.as<const A>();
  in.teacher_deltas = teacher_deltas.as<const A>();
  in.labels = tensor(regions[5]).as<const int64_t>();
  in.gt_boxes = tensor(regions[6]).as<const double>();
  in.region_weights = tensor(regions[7]).as<const A>();
  in.upstream = tensor(regions[8]).as<const A>();
  return in;
}

// results = (feature, classification, regression, gates, scores, factors, grad_logits | None, grad_deltas | None)
template <class A>
RegionOutputs<A> region_outputs(const py::tuple& results) {
  return RegionOutputs<A>{{tensor(results[0]).as<A>(), tensor(results[1]).as<A>(), tensor(results[2]).as<A>()},
                          tensor(results[3]).as<bool>(),
                          tensor(results[4]).as<A>(),
                          tensor(results[5]).as<A>(),
                          tensor(results[6]).as<A>(),
                          tensor(results[7]).as<A>()};
}

void region_distill(const py::list& student_levels, const py::list& teacher_levels, const py::list& grad_levels,
                    const Scales& student_scales, const Scales& teacher_scales, const py::tuple& regions,
                    const py::tuple& results, const py::tuple& align, const py::tuple& loss, int threads) {
  const Pyramid student = pyramid(student_levels, student_scales), teacher = pyramid(teacher_levels, teacher_scales),
                grad = pyramid(grad_levels, student_scales);
  const RoiAlignSpec roi = align_spec(align);
  const LossSpec spec = loss_spec(loss);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    const auto in = region_inputs<A>(regions, student.images);
    const auto out = region_outputs<A>(results);
    py::gil_scoped_release release;
    cpu::region_distill<A>(student, teacher, grad.levels ? &grad : nullptr, in, out, roi, spec, threads);
  });
}

void pooled_distill(const py::object& student_pooled, const py::object& teacher_pooled, const py::object& grad_pooled,
                    const py::tuple& regions, const py::tuple& results, const py::tuple& loss, int threads) {
  const Tensor student = tensor(student_pooled), teacher = tensor(teacher_pooled), grad = tensor(grad_pooled);
  const LossSpec spec = loss_spec(loss);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    const auto in = region_inputs<A>(regions, -1);
    const auto out = region_outputs<A>(results);
    const int32_t channels = static_cast<int32_t>(student.shape[1]), h = static_cast<int32_t>(student.shape[2]),
                  w = static_cast<int32_t>(student.shape[3]);
    py::gil_scoped_release release;
    const auto pooled = pooled_tensor<cpu::PooledTensor>;
    cpu::pooled_distill<A>(pooled(student), pooled(teacher), pooled(grad), channels, h, w, in, out, spec, threads);
  });
}

void roi_align(const py::list& levels, const Scales& scales, const py::object& proposals_object,
               const py::object& pooled_object, const py::tuple& align, bool backward, int threads) {
  const Pyramid features = pyramid(levels, scales);
  const Tensor proposals = tensor(proposals_object), pooled = tensor(pooled_object);
  const RoiAlignSpec spec = align_spec(align);
  accumulate_as(pooled.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    if (backward)
      cpu::roi_align_backward<A>(features, proposals.as<double>(), proposals.shape[0], pooled.as<A>(), spec, threads);
    else
      cpu::roi_align<A>(features, proposals.as<double>(), proposals.shape[0], pooled.as<A>(), spec, threads);
  });
}

void gaussian_feature_loss(const py::list& student_levels, const py::list& teacher_levels, const Scales& scales,
                           const py::object& boxes_object, double sigma_squared, const py::object& loss_object,
                           const py::object& mask_sums_object, int threads) {
  const Pyramid student = pyramid(student_levels, scales), teacher = pyramid(teacher_levels, scales);
  const Tensor boxes = tensor(boxes_object), loss = tensor(loss_object), mask_sums = tensor(mask_sums_object);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::gaussian_feature_loss<A>(student, teacher, boxes.as<double>(), boxes.shape[0], sigma_squared, loss.as<A>(),
                                  mask_sums.as<double>(), threads);
  });
}

void gaussian_feature_loss_backward(const py::list& student_levels, const py::list& teacher_levels,
                                    const py::list& grad_levels, const Scales& scales, const py::object& boxes_object,
                                    double sigma_squared, const py::object& mask_sums_object, double upstream,
                                    int threads) {
  const Pyramid student = pyramid(student_levels, scales), teacher = pyramid(teacher_levels, scales),
                grad = pyramid(grad_levels, scales);
  const Tensor boxes = tensor(boxes_object), mask_sums = tensor(mask_sums_object);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::gaussian_feature_loss_backward<A>(student, teacher, grad, boxes.as<double>(), boxes.shape[0], sigma_squared,
                                           mask_sums.as<double>(), upstream, threads);
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
  py::class_<cpu::Block>(m, "Block", py::buffer_protocol(), "Memory for a large result.")
      .def(py::init<size_t>())
      .def_buffer([](const cpu::Block& block) {
        return py::buffer_info(static_cast<uint8_t*>(block.data()), static_cast<py::ssize_t>(block.bytes()));
      });
  m.def("empty_cache", &cpu::empty_cache);
  m.def("region_distill", &region_distill);
  m.def("pooled_distill", &pooled_distill);
  m.def("roi_align", &roi_align);
  m.def("gaussian_feature_loss", &gaussian_feature_loss);
  m.def("gaussian_feature_loss_backward", &gaussian_feature_loss_backward);
#ifdef TARDKD_CUDA_ARCHITECTURES
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels.");
  bind_cuda(cuda);
#endif
}
