// The CUDA kernels as Python sees them: every function launches on the stream of `target` and returns at once. Made for
// CudaKernels in tardkd/ops/cuda.py, which also allocates the scratch memory.
#include "bindings.h"
#include "cuda/kernels.h"

namespace tardkd {
namespace {

// (device index, stream)
cuda::Target target_of(const py::tuple& target) {
  return cuda::Target{target[0].cast<int32_t>(), reinterpret_cast<void*>(target[1].cast<uintptr_t>())};
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

// Tensors of one or two axes, of any strides; None: absent.
cuda::Table table(const py::object& object) {
  const Tensor t = tensor(object);
  if (t.shape.empty()) return cuda::Table{};
  return cuda::Table{t.data, t.dtype, t.strides[0], t.strides.size() > 1 ? t.strides[1] : 0};
}

int32_t columns(const py::object& object) { return static_cast<int32_t>(tensor(object).shape[1]); }

// regions = (proposals, student_logits, teacher_logits, student_deltas, teacher_deltas, labels, gt_boxes,
//            region_weights | None, upstream | None)
cuda::RegionTables region_tables(const py::tuple& regions, int32_t images) {
  const Tensor labels = tensor(regions[5]);
  cuda::RegionTables in{};
  in.regions = labels.shape[0];
  in.images = images;
  in.logit_columns = columns(regions[1]);
  in.student_delta_columns = columns(regions[3]);
  in.teacher_delta_columns = columns(regions[4]);
  in.proposals = table(regions[0]);
  in.student_logits = table(regions[1]);
  in.teacher_logits = table(regions[2]);
  in.student_deltas = table(regions[3]);
  in.teacher_deltas = table(regions[4]);
  in.gt_boxes = table(regions[6]);
  in.region_weights = table(regions[7]);
  in.upstream = table(regions[8]);
  in.labels = labels.as<const int64_t>();
  in.label_stride = labels.strides[0];
  return in;
}

// results = (feature, classification, regression, gates, scores, factors, grad_logits | None, grad_deltas | None)
// scratch = (done, partial)
template <class A>
cuda::RegionResults<A> region_results(const py::tuple& results, const py::tuple& scratch) {
  cuda::RegionResults<A> out{};
  for (int term = 0; term < 3; ++term) out.losses[term] = tensor(results[term]).as<A>();
  out.gates = tensor(results[3]).as<bool>();
  out.scores = tensor(results[4]).as<A>();
  out.factors = tensor(results[5]).as<A>();
  out.grad_logits = tensor(results[6]).as<A>();
  out.grad_deltas = tensor(results[7]).as<A>();
  out.done = tensor(scratch[0]).as<int32_t>();
  out.partial = tensor(scratch[1]).as<A>();
  return out;
}

void region_distill(const py::list& student_levels, const py::list& teacher_levels, const py::list& grad_levels,
                    const py::object& grad_pooled, const Scales& student_scales, const Scales& teacher_scales,
                    const py::tuple& regions, const py::tuple& results, const py::tuple& scratch,
                    const py::tuple& align, const py::tuple& loss, const py::tuple& target) {
  const Pyramid student = pyramid(student_levels, student_scales), teacher = pyramid(teacher_levels, teacher_scales),
                grad = pyramid(grad_levels, student_scales);
  const Tensor pooled = tensor(grad_pooled);
  const cuda::RegionTables in = region_tables(regions, student.images);
  const RoiAlignSpec roi = align_spec(align);
  const LossSpec spec = loss_spec(loss);
  const cuda::Target at = target_of(target);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_results<A>(results, scratch);
    run([&] {
      return cuda::region_distill<A>(student, teacher, grad.levels ? &grad : nullptr, pooled.as<A>(), in, out, roi,
                                     spec, at);
    });
  });
}

void pooled_distill(const py::object& student_pooled, const py::object& teacher_pooled, const py::object& grad_pooled,
                    const py::tuple& regions, const py::tuple& results, const py::tuple& scratch, const py::tuple& loss,
                    const py::tuple& target) {
  const Tensor student = tensor(student_pooled), teacher = tensor(teacher_pooled), grad = tensor(grad_pooled);
  const auto pooled = pooled_tensor<cuda::PooledTensor>;
  const cuda::RegionTables in = region_tables(regions, -1);
  const LossSpec spec = loss_spec(loss);
  const cuda::Target at = target_of(target);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    const auto out = region_results<A>(results, scratch);
    const int32_t channels = static_cast<int32_t>(student.shape[1]), h = static_cast<int32_t>(student.shape[2]),
                  w = static_cast<int32_t>(student.shape[3]);
    run([&] {
      return cuda::pooled_distill<A>(pooled(student), pooled(teacher), pooled(grad), channels, h, w, in, out, spec, at);
    });
  });
}

void roi_align(const py::list& levels, const Scales& scales, const py::object& proposals_object,
               const py::object& pooled_object, const py::tuple& align, const py::tuple& target) {
  const Pyramid features = pyramid(levels, scales);
  const cuda::Table proposals = table(proposals_object);
  const Tensor pooled = tensor(pooled_object);
  const RoiAlignSpec spec = align_spec(align);
  const cuda::Target at = target_of(target);
  run([&] { return cuda::roi_align(features, proposals, pooled.shape[0], pooled.data, spec, at); });
}

void roi_align_scatter(const py::list& grad_levels, const Scales& scales, const py::object& proposals_object,
                       const py::object& pooled_object, const py::tuple& align, const py::tuple& target) {
  const Pyramid grad = pyramid(grad_levels, scales);
  const cuda::Table proposals = table(proposals_object);
  const Tensor pooled = tensor(pooled_object);
  const RoiAlignSpec spec = align_spec(align);
  const cuda::Target at = target_of(target);
  accumulate_as(grad.dtype, [&](auto a) {
    using A = decltype(a);
    run([&] {
      return cuda::roi_align_scatter<A>(grad, proposals, pooled.shape[0], pooled.data, pooled.dtype, spec, at);
    });
  });
}

void roi_align_gather(const py::list& grad_levels, const Scales& scales, const py::object& proposals_object,
                      const py::object& open_object, const py::object& pooled_object, const py::object& windows_object,
                      const py::tuple& align, const py::tuple& target) {
  const Pyramid grad = pyramid(grad_levels, scales);
  const cuda::Table proposals = table(proposals_object);
  const Tensor open = tensor(open_object), pooled = tensor(pooled_object), windows = tensor(windows_object);
  const RoiAlignSpec spec = align_spec(align);
  const cuda::Target at = target_of(target);
  run([&] {
    return cuda::roi_align_gather(grad, proposals, pooled.shape[0], open.as<const bool>(), pooled.data, pooled.dtype,
                                  windows.as<int32_t>(), spec, at);
  });
}

int64_t gaussian_partials(const py::list& student_levels, const Scales& scales) {
  return cuda::gaussian_partials(pyramid(student_levels, scales));
}

// scratch = (done, partial)
void gaussian_feature_loss(const py::list& student_levels, const py::list& teacher_levels, const Scales& scales,
                           const py::object& boxes_object, double sigma_squared, const py::tuple& scratch,
                           const py::object& mask_sums_object, const py::object& loss_object, const py::tuple& target) {
  const Pyramid student = pyramid(student_levels, scales), teacher = pyramid(teacher_levels, scales);
  const cuda::Table boxes = table(boxes_object);
  const int64_t count = tensor(boxes_object).shape[0];
  const Tensor done = tensor(scratch[0]), partial = tensor(scratch[1]), mask_sums = tensor(mask_sums_object),
               loss = tensor(loss_object);
  const cuda::Target at = target_of(target);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    run([&] {
      return cuda::gaussian_feature_loss<A>(student, teacher, boxes, count, sigma_squared, partial.as<double>(),
                                            done.as<int32_t>(), mask_sums.as<double>(), loss.as<A>(), at);
    });
  });
}

void gaussian_feature_loss_backward(const py::list& student_levels, const py::list& teacher_levels,
                                    const py::list& grad_levels, const Scales& scales, const py::object& boxes_object,
                                    double sigma_squared, const py::object& mask_sums_object,
                                    const py::object& upstream_object, const py::tuple& target) {
  const Pyramid student = pyramid(student_levels, scales), teacher = pyramid(teacher_levels, scales),
                grad = pyramid(grad_levels, scales);
  const cuda::Table boxes = table(boxes_object);
  const int64_t count = tensor(boxes_object).shape[0];
  const Tensor mask_sums = tensor(mask_sums_object), upstream = tensor(upstream_object);
  const cuda::Target at = target_of(target);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    run([&] {
      return cuda::gaussian_feature_loss_backward<A>(student, teacher, grad, boxes, count, sigma_squared,
                                                     mask_sums.as<const double>(), upstream.as<const A>(), at);
    });
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("region_partials", &cuda::region_partials);
  m.def("region_distill", &region_distill);
  m.def("pooled_distill", &pooled_distill);
  m.def("roi_align", &roi_align);
  m.def("roi_align_scatter", &roi_align_scatter);
  m.def("roi_align_gather", &roi_align_gather);
  m.def("gaussian_partials", &gaussian_partials);
  m.def("gaussian_feature_loss", &gaussian_feature_loss);
  m.def("gaussian_feature_loss_backward", &gaussian_feature_loss_backward);
}

}  // namespace tardkd
