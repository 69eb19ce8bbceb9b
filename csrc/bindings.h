// What the bindings of both back ends share. Tensors arrive as (data_ptr, dtype code, shape, strides) tuples that
// tardkd/ops/native.py makes; Python allocates every result.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/common.h"

namespace tardkd {

namespace py = pybind11;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::vector<int64_t> shape, strides;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  explicit operator bool() const { return data != nullptr; }
};

// None becomes a null tensor: an optional input, or a result that is not wanted.
inline Tensor tensor(const py::object& object) {
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

using Scales = std::vector<double>;

// No levels: a gradient that is not wanted.
inline Pyramid pyramid(const py::list& levels, const Scales& scales) {
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
    p.level[level] = FeatureMap{t.data,
                                t.strides[0],
                                t.strides[1],
                                t.strides[2],
                                t.strides[3],
                                static_cast<int32_t>(t.shape[2]),
                                static_cast<int32_t>(t.shape[3]),
                                scales[level]};
  }
  return p;
}

// (R, C, h, w) as (R, C, bins), a PooledTensor of either back end. Python sees to it that h and w are one axis.
template <class Pooled>
Pooled pooled_tensor(const Tensor& t) {
  if (!t) return Pooled{};
  return Pooled{t.data, t.dtype, {t.strides[0], t.strides[1], t.strides[t.shape[3] > 1 ? 3 : 2]}};
}

// (pooled_h, pooled_w, sampling_ratio, aligned, canonical_scale, canonical_level)
inline RoiAlignSpec align_spec(const py::tuple& align) {
  return RoiAlignSpec{align[0].cast<int>(),  align[1].cast<int>(),    align[2].cast<int>(),
                      align[3].cast<bool>(), align[4].cast<double>(), align[5].cast<double>()};
}

// (choices, temperature, beta, box_weights)
inline LossSpec loss_spec(const py::tuple& loss) {
  const auto choices = loss[0].cast<std::array<int, 8>>();
  const auto box_weights = loss[3].cast<std::array<double, 4>>();
  return LossSpec{static_cast<FeatureLoss>(choices[0]),
                  static_cast<BinWeight>(choices[1]),
                  static_cast<FeatureGate>(choices[2]),
                  static_cast<ClassificationGate>(choices[3]),
                  static_cast<RegressionGate>(choices[4]),
                  static_cast<Background>(choices[5]),
                  static_cast<Activation>(choices[6]),
                  static_cast<Reduction>(choices[7]),
                  loss[1].cast<double>(),
                  loss[2].cast<double>(),
                  {box_weights[0], box_weights[1], box_weights[2], box_weights[3]}};
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
