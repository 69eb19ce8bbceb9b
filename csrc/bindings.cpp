// The only file that knows Python. Tensors arrive as (data_ptr, dtype code, shape, strides) tuples that
// tardkd/ops/native.py makes; Python allocates every result. The interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/hot.h"
#include "cpu/kernels.h"
#ifdef TARDKD_CUDA_ARCHITECTURES
#include "cuda/runtime.h"
#endif

namespace py = pybind11;
using namespace tardkd;

namespace {

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::vector<int64_t> shape, strides;

  template <class T>
  T* as() const { return static_cast<T*>(data); }
  explicit operator bool() const { return data != nullptr; }
};

// None becomes a null tensor: an optional input, or a result that is not wanted.
Tensor tensor(const py::object& object) {
  Tensor t;
  if (object.is_none()) return t;
  const auto [data, dtype, shape, strides] =
      object.cast<std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>>();
  t.data = reinterpret_cast<void*>(data);
  t.dtype = static_cast<DType>(dtype);
  t.shape = shape;
  t.strides = strides;
  return t;
}

Pyramid pyramid(const py::list& levels, const std::vector<double>& scales) {
  if (levels.size() > kMaxLevels)
    throw std::invalid_argument("a pyramid has at most " + std::to_string(kMaxLevels) + " levels, got " +
                                std::to_string(levels.size()));
  Pyramid p{};
  p.levels = static_cast<int32_t>(levels.size());
  for (int32_t level = 0; level < p.levels; ++level) {
    const Tensor t = tensor(levels[level]);
    p.images = static_cast<int32_t>(t.shape[0]);
    p.channels = static_cast<int32_t>(t.shape[1]);
    p.dtype = t.dtype;
    p.level[level] = FeatureMap{t.data,       t.strides[0], t.strides[1], t.strides[2],
                                t.strides[3], static_cast<int32_t>(t.shape[2]), static_cast<int32_t>(t.shape[3]),
                                scales[level]};
  }
  return p;
}

// (pooled_h, pooled_w, sampling_ratio, aligned, canonical_scale, canonical_level)
RoiAlignSpec align_spec(const py::tuple& align) {
  return RoiAlignSpec{align[0].cast<int>(),  align[1].cast<int>(),    align[2].cast<int>(),
                      align[3].cast<bool>(), align[4].cast<double>(), align[5].cast<double>()};
}

// (choices, temperature, beta, box_weights)
LossSpec loss_spec(const py::tuple& loss) {
  const auto choices = loss[0].cast<std::array<int, 8>>();
  const auto box_weights = loss[3].cast<std::array<double, 4>>();
  return LossSpec{static_cast<FeatureLoss>(choices[0]),        static_cast<BinWeight>(choices[1]),
                static_cast<FeatureGate>(choices[2]),        static_cast<ClassificationGate>(choices[3]),
                static_cast<RegressionGate>(choices[4]),     static_cast<Background>(choices[5]),
                static_cast<Activation>(choices[6]),         static_cast<Reduction>(choices[7]),
                loss[1].cast<double>(), loss[2].cast<double>(),
                {box_weights[0], box_weights[1], box_weights[2], box_weights[3]}};
}

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

// results = (feature, classification, regression, gates, scores, grad_logits | None, grad_deltas | None)
template <class A>
RegionOutputs<A> region_outputs(const py::tuple& results) {
  return RegionOutputs<A>{{tensor(results[0]).as<A>(), tensor(results[1]).as<A>(), tensor(results[2]).as<A>()},
                          tensor(results[3]).as<bool>(),
                          tensor(results[4]).as<A>(),
                          tensor(results[5]).as<A>(),
                          tensor(results[6]).as<A>()};
}

// (R, C, h, w) as (R, C, bins): the Python side sees to dense NCHW or channels_last.
cpu::PooledTensor pooled_tensor(const Tensor& t) {
  if (!t) return cpu::PooledTensor{};
  return cpu::PooledTensor{t.data, t.dtype, {t.strides[0], t.strides[1], t.strides[3]}};
}

// Calls f(A()) with the accumulation type that goes with a stored type.
template <class F>
void accumulate_as(DType dtype, const F& f) {
  if (dtype == DType::float64)
    f(double());
  else
    f(float());
}

using Scales = std::vector<double>;

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
    cpu::pooled_distill<A>(pooled_tensor(student), pooled_tensor(teacher), pooled_tensor(grad), channels, h, w, in,
                           out, spec, threads);
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

void gaussian_feature_loss(const py::list& student_levels, const py::list& teacher_levels,
                           const py::list& grad_levels, const Scales& scales, const py::object& boxes_object,
                           double sigma_squared, const py::object& loss_object, int threads) {
  const Pyramid student = pyramid(student_levels, scales), teacher = pyramid(teacher_levels, scales),
                grad = pyramid(grad_levels, scales);
  const Tensor boxes = tensor(boxes_object), loss = tensor(loss_object);
  accumulate_as(student.dtype, [&](auto a) {
    using A = decltype(a);
    py::gil_scoped_release release;
    cpu::gaussian_feature_loss<A>(student, teacher, grad.levels ? &grad : nullptr, boxes.as<double>(),
                                  boxes.shape[0], sigma_squared, loss.as<A>(), threads);
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
  m.def("region_distill", &region_distill);
  m.def("pooled_distill", &pooled_distill);
  m.def("roi_align", &roi_align);
  m.def("gaussian_feature_loss", &gaussian_feature_loss);
}
