// How the bindings read a tensor of torch, which they are built without: by the function that torch offers to C for it,
// a part of DLPack (https://dmlc.github.io/dlpack, version 1), or where there is none, before torch 2.10, by Python's
// attributes, which takes ten times as long. Whoever calls keeps the tensors alive.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "core/common.h"

namespace tardkd {

namespace py = pybind11;

// A Python string that is made once for each place in the code: to make it anew takes longer than to look it up.
#define TARDKD_NAME(name)                                          \
  ([] {                                                            \
    static PyObject* const key = PyUnicode_InternFromString(name); \
    return key;                                                    \
  }())

inline py::object attribute(const py::handle& object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

constexpr int kMaxAxes = 4;

struct Tensor {
  void* data = nullptr;  // null where there are no elements
  DType dtype = DType::float32;
  bool is_float = true;  // else `dtype` means nothing
  int32_t bytes = 4;     // of an element
  int32_t axes = 0;
  std::array<int64_t, kMaxAxes> shape{}, strides{};

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int32_t size(int axis) const { return static_cast<int32_t>(shape[axis]); }
  explicit operator bool() const { return data != nullptr; }
};

// Told of every tensor that is read; null: nobody listens. For stand-ins of a device, which hold the kernels to what
// they were given.
inline void (*on_tensor)(const Tensor&) = nullptr;

// ---- DLPack ---------------------------------------------------------------------------------------------------------

struct DLTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t axes;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

// Describes `object`, which stays the owner of all that `tensor` points to. 0, or -1 with Python's error set.
using DescribeTensor = int (*)(void* object, DLTensor* tensor);

// make(), once: without the deadlock of a static variable whose initialiser gives Python's lock away.
template <class Make>
auto& once(Make make) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<decltype(make())> storage;
  return storage.call_once_and_store_result(make).get_stored();
}

// Null where torch has no such function.
inline DescribeTensor describe_tensor() {
  struct Api {
    uint32_t major, minor;
    void *previous, *allocate, *take, *give;
    DescribeTensor describe;
  };
  return once([] {
    const py::object tensor_class = py::module_::import("torch").attr("Tensor");
    const char* const name = "__dlpack_c_exchange_api__";
    if (!py::hasattr(tensor_class, name)) return DescribeTensor();
    const Api* const api = tensor_class.attr(name).cast<py::capsule>().get_pointer<Api>();
    return api->major == 1 ? api->describe : nullptr;
  });
}

inline void set_type(Tensor& t, bool is_float, bool is_bfloat, int bits) {
  t.is_float = is_float;
  t.bytes = bits / 8;
  t.dtype = is_bfloat ? DType::bfloat16 : bits == 64 ? DType::float64 : bits == 32 ? DType::float32 : DType::float16;
}

inline void set_axes(Tensor& t, size_t axes, const int64_t* shape, const int64_t* strides) {
  if (axes > kMaxAxes) throw std::invalid_argument("the kernels take tensors of at most four axes");
  t.axes = static_cast<int32_t>(axes);
  std::copy_n(shape, axes, t.shape.begin());
  std::copy_n(strides, axes, t.strides.begin());
  if (std::count(t.shape.begin(), t.shape.begin() + t.axes, 0)) t.data = nullptr;
}

inline Tensor from_dlpack(const DLTensor& described) {
  constexpr uint8_t kFloat = 2, kBfloat = 4;
  Tensor t;
  t.data = static_cast<char*>(described.data) + described.byte_offset;
  const uint8_t code = described.dtype.code;
  set_type(t, code == kFloat || code == kBfloat, code == kBfloat, described.dtype.bits);
  set_axes(t, size_t(described.axes), described.shape, described.strides);
  return t;
}

inline Tensor from_attributes(const py::handle& object) {
  Tensor t;
  t.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  const py::object dtype = object.attr("dtype");
  const bool is_bfloat = dtype.is(py::module_::import("torch").attr("bfloat16"));
  set_type(t, dtype.attr("is_floating_point").cast<bool>(), is_bfloat, 8 * dtype.attr("itemsize").cast<int>());
  const auto shape = object.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = object.attr("stride")().cast<std::vector<int64_t>>();
  set_axes(t, shape.size(), shape.data(), strides.data());
  return t;
}

// ---- what the bindings call -----------------------------------------------------------------------------------------

// None becomes a null tensor: an optional input that is absent. A result that is not wanted is empty, thus null too.
inline Tensor tensor_unannounced(const py::handle& object) {
  if (object.is_none()) return Tensor{};
  const DescribeTensor describe = describe_tensor();
  if (!describe) return from_attributes(object);
  DLTensor described;
  if (describe(object.ptr(), &described) != 0) throw py::error_already_set();
  return from_dlpack(described);
}

inline Tensor tensor(const py::handle& object) {
  const Tensor t = tensor_unannounced(object);
  if (on_tensor && t) on_tensor(t);
  return t;
}

// `count` elements of a contiguous tensor of one axis, from `begin` on.
inline Tensor part(const Tensor& all, int64_t begin, int64_t count) {
  Tensor t = all;
  t.shape[0] = count;
  t.data = count ? all.as<char>() + begin * all.bytes : nullptr;
  if (on_tensor && t) on_tensor(t);
  return t;
}

}  // namespace tardkd
