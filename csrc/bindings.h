// What the bindings of both back ends share: Python's tensors and named tuples as the structs of core/common.h.
//
// Python allocates every result. Settings and sets of tensors are named tuples of tardkd/ops (spec.py, inputs.py,
// cuda.py), whose fields are read here by their names; absent tensors are None, a pyramid is a pair of its maps,
// L x (N, C_l, H_l, W_l), and their scales.
#pragma once

#include <string>
#include <vector>

#include "tensor.h"

namespace tardkd {

// A field of a named tuple.
#define TARDKD_FIELD(tuple, name) attribute(tuple, TARDKD_NAME(name))

// --- tensors -------------------------------------------------------------------------------------------------------

// Without levels: a gradient that is not wanted. `norms`: those of the levels, one after the other.
inline Pyramid pyramid(const py::object& maps_and_scales, const Tensor& norms = Tensor{}) {
  const auto [maps, scales] = maps_and_scales.cast<std::pair<std::vector<py::object>, std::vector<double>>>();
  if (maps.size() > kMaxLevels)
    throw std::invalid_argument("a pyramid has at most " + std::to_string(kMaxLevels) + " levels, got " +
                                std::to_string(maps.size()));
  Pyramid p{};
  p.levels = static_cast<int32_t>(maps.size());
  const char* norm = norms.as<const char>();
  for (int32_t level = 0; level < p.levels; ++level) {
    const Tensor t = tensor(maps[level]);
    p.images = t.size(0);
    p.max_channels = std::max(p.max_channels, t.size(1));
    p.dtype = t.dtype;
    p.level[level] = FeatureMap{t.data,    t.strides[0], t.strides[1],  t.strides[2], t.strides[3],
                                t.size(2), t.size(3),    scales[level], t.size(1),    norm};
    if (norm) norm += 2 * t.size(1) * norms.bytes;
  }
  return p;
}

// The maps of `gradient` for the features of `like`: a list of them, or a pair of one flat tensor that holds them one
// after the other (maps.py) and of whether each is in channels_last order; empty: it is not wanted.
inline Pyramid gradient_pyramid(const py::object& gradient, const Pyramid& like) {
  Pyramid p = like;
  const bool is_list = PyList_Check(gradient.ptr());
  const auto flags = is_list ? std::vector<bool>() : gradient.cast<std::pair<py::object, std::vector<bool>>>().second;
  const Tensor flat = is_list ? Tensor{} : tensor_unannounced(gradient[py::int_(0)]);
  p.levels = static_cast<int32_t>(is_list ? py::len(gradient) : flags.size());
  for (int64_t level = 0, begin = 0; level < p.levels; ++level) {
    FeatureMap& map = p.level[level];
    Tensor t;
    if (is_list) {
      t = tensor(gradient[py::int_(level)]);
    } else {
      const int64_t c = map.channels, h = map.height, w = map.width;
      t = part(flat, begin, p.images * c * h * w);
      begin += t.shape[0];
      t.strides = flags[level] ? std::array<int64_t, 4>{c * h * w, 1, w * c, c}
                               : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
    }
    p.dtype = is_list ? t.dtype : flat.dtype;
    map = FeatureMap{t.data,     t.strides[0], t.strides[1], t.strides[2], t.strides[3],
                     map.height, map.width,    map.scale,    map.channels, nullptr};
  }
  return p;
}

// (R, C, h, w); Python sees to it that h and w can be walked as one axis. A null tensor becomes an absent one.
inline PooledTensor pooled_tensor(const Tensor& t, const Tensor& norm = Tensor{}) {
  if (!t) return PooledTensor{};
  const int64_t bins = t.strides[t.shape[3] > 1 ? 3 : 2];
  return PooledTensor{t.data, t.dtype, t.size(1), t.size(2), t.size(3), {t.strides[0], t.strides[1], bins}, norm.data};
}

// Tensors of one or two axes. A null tensor becomes an absent table.
inline Table table(const Tensor& t) {
  return t.axes == 0 ? Table{} : Table{t.data, t.dtype, t.strides[0], t.strides[1]};
}

// (R,) of int64, or None where the level rule decides; `levels`: those of the pyramid.
inline GivenLevels given_levels(const py::object& given, int32_t levels) {
  const Tensor t = tensor(given);
  return t ? GivenLevels{t.as<const int64_t>(), t.strides[0], levels} : GivenLevels{};
}

// --- settings ------------------------------------------------------------------------------------------------------

// The enumerator that `given` names; `names` in the order of the enumerators.
template <class Enum, size_t n>
Enum choice(const py::object& given, const std::array<const char*, n>& names) {
  for (size_t i = 0; i < n; ++i)
    if (PyUnicode_CompareWithASCIIString(given.ptr(), names[i]) == 0) return static_cast<Enum>(i);
  throw std::invalid_argument("unknown to the kernels: " + std::string(py::str(given)));
}

inline RoiAlignSpec align_spec(const py::object& align) {
  const auto [pooled_h, pooled_w] = TARDKD_FIELD(align, "output_size").cast<std::pair<int32_t, int32_t>>();
  RoiAlignSpec spec{};
  spec.pooled_h = pooled_h;
  spec.pooled_w = pooled_w;
  spec.sampling_ratio = TARDKD_FIELD(align, "sampling_ratio").cast<int32_t>();
  spec.aligned = TARDKD_FIELD(align, "aligned").cast<bool>();
  spec.canonical_scale = TARDKD_FIELD(align, "canonical_scale").cast<double>();
  spec.canonical_level = TARDKD_FIELD(align, "canonical_level").cast<double>();
  return spec;
}

inline Reduction reduction_of(const py::object& given) { return choice<Reduction, 3>(given, {"mean", "sum", "none"}); }

inline LossSpec loss_spec(const py::object& loss) {
  LossSpec spec{};
  spec.feature_loss = choice<FeatureLoss, 3>(TARDKD_FIELD(loss, "feature_loss"), {"squared", "absolute", "smooth_l1"});
  spec.bin_weight = choice<BinWeight, 2>(TARDKD_FIELD(loss, "bin_weight"), {"uniform", "gaussian"});
  spec.feature_gate = choice<FeatureGate, 5>(TARDKD_FIELD(loss, "feature_gate"),
                                             {"all", "foreground", "classification", "regression", "either"});
  spec.classification_gate =
      choice<ClassificationGate, 3>(TARDKD_FIELD(loss, "classification_gate"), {"all", "foreground", "teacher_better"});
  spec.regression_gate =
      choice<RegressionGate, 3>(TARDKD_FIELD(loss, "regression_gate"), {"foreground", "vs_proposal", "vs_student"});
  spec.background = choice<Background, 2>(TARDKD_FIELD(loss, "background"), {"first", "last"});
  spec.activation = choice<Activation, 2>(TARDKD_FIELD(loss, "activation"), {"softmax", "sigmoid"});
  spec.reduction = reduction_of(TARDKD_FIELD(loss, "reduction"));
  spec.box_coding = choice<BoxCoding, 2>(TARDKD_FIELD(loss, "box_coding"), {"deltas", "boxes"});
  spec.temperature = TARDKD_FIELD(loss, "temperature").cast<double>();
  spec.beta = TARDKD_FIELD(loss, "beta").cast<double>();
  const auto box_weights = TARDKD_FIELD(loss, "box_weights").cast<std::array<double, 4>>();
  for (int i = 0; i < 4; ++i) spec.box_weights[i] = box_weights[i];
  return spec;
}

// --- regions -------------------------------------------------------------------------------------------------------

// `images` negative: the proposals' image index is not looked at. `upstream` (3, R), or null for ones.
inline RegionInputs region_inputs(const py::object& inputs, const Tensor& upstream, int32_t images) {
  const Tensor student_logits = tensor(TARDKD_FIELD(inputs, "student_logits")),
               student_deltas = tensor(TARDKD_FIELD(inputs, "student_deltas")),
               teacher_deltas = tensor(TARDKD_FIELD(inputs, "teacher_deltas")),
               labels = tensor(TARDKD_FIELD(inputs, "labels"));
  RegionInputs in{};
  in.regions = labels.shape[0];
  in.images = images;
  in.logit_columns = student_logits.size(1);
  in.student_delta_columns = student_deltas.size(1);
  in.teacher_delta_columns = teacher_deltas.size(1);
  in.proposals = table(tensor(TARDKD_FIELD(inputs, "proposals")));
  in.student_logits = table(student_logits);
  in.teacher_logits = table(tensor(TARDKD_FIELD(inputs, "teacher_logits")));
  in.student_deltas = table(student_deltas);
  in.teacher_deltas = table(teacher_deltas);
  in.gt_boxes = table(tensor(TARDKD_FIELD(inputs, "gt_boxes")));
  in.region_weights = table(tensor(TARDKD_FIELD(inputs, "region_weights")));
  in.student_scores = table(tensor(TARDKD_FIELD(inputs, "student_scores")));
  in.teacher_scores = table(tensor(TARDKD_FIELD(inputs, "teacher_scores")));
  in.upstream = table(upstream);
  in.labels = labels.as<const int64_t>();
  in.label_stride = labels.strides[0];
  return in;
}

// The same where the regions are pooled from the pyramids of `student` and `teacher`.
inline RegionInputs region_inputs(const py::object& inputs, const Tensor& upstream, const Pyramid& student,
                                  const Pyramid& teacher) {
  RegionInputs in = region_inputs(inputs, upstream, student.images);
  in.student_levels = given_levels(TARDKD_FIELD(inputs, "student_levels"), student.levels);
  in.teacher_levels = given_levels(TARDKD_FIELD(inputs, "teacher_levels"), teacher.levels);
  for (int32_t level = 0; level < kMaxLevels; ++level)  // the teacher may have more levels, of the same channels
    in.level_channels[level] = student.level[level < student.levels ? level : 0].channels;
  return in;
}

// The tensors and settings of DistributionCall.
inline DistributionInputs distribution_inputs(const py::object& student, const py::object& teacher,
                                              const py::object& gates, const py::object& region_weights,
                                              double temperature, const py::object& reduction) {
  const auto distributions = [](const Tensor& t) {
    return Distributions{t.data, t.dtype, t.size(2), t.strides[0], t.strides[1], t.strides[2]};
  };
  const Tensor open = tensor(gates);
  DistributionInputs in{};
  in.regions = open.shape[0];
  in.student = distributions(tensor(student));
  in.teacher = distributions(tensor(teacher));
  in.gates = open.as<const bool>();
  in.gate_stride = open.strides[0];
  in.region_weights = table(tensor(region_weights));
  in.temperature = temperature;
  in.reduction = reduction_of(reduction);
  return in;
}

// RegionResults, but for the features' gradient, which the kernels take as a pyramid or as pooled features.
template <class A>
RegionOutputs<A> region_outputs(const py::object& results) {
  const Tensor feature = tensor(TARDKD_FIELD(results, "feature")),
               classification = tensor(TARDKD_FIELD(results, "classification")),
               regression = tensor(TARDKD_FIELD(results, "regression")), gates = tensor(TARDKD_FIELD(results, "gates")),
               scores = tensor(TARDKD_FIELD(results, "scores")), factors = tensor(TARDKD_FIELD(results, "factors")),
               grad_logits = tensor(TARDKD_FIELD(results, "grad_logits")),
               grad_deltas = tensor(TARDKD_FIELD(results, "grad_deltas"));
  return RegionOutputs<A>{{feature.as<A>(), classification.as<A>(), regression.as<A>()},
                          gates.as<bool>(),
                          scores.as<A>(),
                          factors.as<A>(),
                          grad_logits.as<A>(),
                          grad_deltas.as<A>()};
}

// Calls f(A()) with the accumulation type that goes with a stored type.
template <class F>
void accumulate_as(DType dtype, const F& f) {
  if (dtype == DType::float64)
    f(double());
  else
    f(float());
}

// Adds the CUDA kernels to a module.
void bind_cuda(py::module_& m);

}  // namespace tardkd
