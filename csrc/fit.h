// A look at what a loss over regions is given, in 3 us where tardkd/ops/checks.py takes 45.
#pragma once

#include "bindings.h"

namespace tardkd {

class Look {
 public:
  enum Kind { feature, box, label };

  // Whether `object` is one of torch's own tensors, of that many axes and kind, on the device of those seen before. Of
  // `is_detached`: whether it needs no gradient.
  bool see(const py::handle& object, int axes, Kind kind, bool is_detached, DLTensor& seen) {
    const std::array<py::handle, 2>& own = once([] {
      const auto torch = py::module_::import("torch");
      const py::object tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
      return std::array<py::handle, 2>{tensor.inc_ref(), parameter.inc_ref()};
    });
    if (!py::type::handle_of(object).is(own[0]) && !py::type::handle_of(object).is(own[1])) return false;
    if (describe_tensor()(object.ptr(), &seen) != 0) return PyErr_Clear(), false;
    if (!is_first_ && (seen.device_type != device_type_ || seen.device_index != device_index_)) return false;
    is_first_ = false;
    device_type_ = seen.device_type;
    device_index_ = seen.device_index;
    if (is_detached && attribute(object, TARDKD_NAME("requires_grad")).ptr() == Py_True) return false;
    return seen.axes == axes && is_of(kind, seen);
  }

 private:
  static bool is_of(Kind kind, const DLTensor& seen) {
    constexpr uint8_t kInteger = 0, kFloat = 2, kBfloat = 4;
    const auto [code, bits, lanes] = seen.dtype;
    if (kind == label) return code == kInteger && bits == 64;
    return (code == kFloat && bits >= (kind == box ? 32 : 16)) || (kind == feature && code == kBfloat);
  }

  bool is_first_ = true;
  int32_t device_type_ = 0, device_index_ = 0;
};

inline bool is_double(const DLTensor& t) { return t.dtype.bits == 64; }

// Maps (N, C, H_l, W_l) of one dtype, as those of `first` if it has been seen. Returns how many; 0: they are not so.
inline int64_t fit_pyramid(Look& look, const py::handle& features, bool is_detached, DLTensor& first, bool& is_seen) {
  if (!PyList_CheckExact(features.ptr()) && !PyTuple_CheckExact(features.ptr())) return 0;
  const Py_ssize_t levels = PySequence_Fast_GET_SIZE(features.ptr());
  if (levels > kMaxLevels) return 0;
  DLTensor finest, map;
  for (Py_ssize_t level = 0; level < levels; ++level) {
    if (!look.see(PySequence_Fast_GET_ITEM(features.ptr(), level), 4, Look::feature, is_detached, map)) return 0;
    if (level == 0) finest = map;
    if (!is_seen) first = map;
    is_seen = true;
    if (map.shape[0] != first.shape[0] || map.shape[1] != first.shape[1] || map.shape[2] < 1 || map.shape[3] < 1 ||
        map.dtype.code != finest.dtype.code || map.dtype.bits != finest.dtype.bits ||
        is_double(map) != is_double(first))
      return 0;
  }
  return levels;
}

// Whether all of it is as it nearly always is, so that checks.py, which has the rules and the messages, would find
// nothing: plain tensors that fit together, channels that do not differ from level to level, no levels or scores from
// outside. False: it is to be asked.
//
// `pyramids`: those of student and teacher; `pooled`: their pooled features, (R, C, h, w); None: there are none.
inline bool fit(const py::handle& inputs, const std::string& activation, const py::object& pyramids,
                const py::object& pooled) {
  if (!describe_tensor()) return false;
  Look look;
  DLTensor first, other;
  bool is_seen = false;
  int64_t rows = -1;  // of pooled features
  if (!pyramids.is_none() && (!fit_pyramid(look, pyramids[py::int_(0)], false, first, is_seen) ||
                              !fit_pyramid(look, pyramids[py::int_(1)], true, first, is_seen)))
    return false;
  if (!pooled.is_none()) {
    is_seen = true;
    if (!look.see(pooled[py::int_(0)], 4, Look::feature, false, first) ||
        !look.see(pooled[py::int_(1)], 4, Look::feature, true, other) ||
        !std::equal(first.shape, first.shape + 4, other.shape) || is_double(first) != is_double(other))
      return false;
    rows = first.shape[0];
  }
  struct Column {
    PyObject* name;
    int axes;
    Look::Kind kind;
    bool is_detached, is_optional;
    int64_t width;  // -1: unknown yet
  };
  std::array<Column, 8> columns{{{TARDKD_NAME("student_logits"), 2, Look::feature, false, false, -1},
                                 {TARDKD_NAME("teacher_logits"), 2, Look::feature, true, false, -1},
                                 {TARDKD_NAME("student_deltas"), 2, Look::feature, false, false, -1},
                                 {TARDKD_NAME("teacher_deltas"), 2, Look::feature, true, false, -1},
                                 {TARDKD_NAME("proposals"), 2, Look::box, true, false, -1},
                                 {TARDKD_NAME("labels"), 1, Look::label, false, false, -1},
                                 {TARDKD_NAME("gt_boxes"), 2, Look::box, false, false, -1},
                                 {TARDKD_NAME("region_weights"), 1, Look::feature, true, true, -1}}};
  for (size_t k = 0; k < columns.size(); ++k) {
    Column& column = columns[k];
    const py::object tensor = attribute(inputs, column.name);
    if (column.is_optional && tensor.is_none()) continue;
    if (!look.see(tensor, column.axes, column.kind, column.is_detached, other)) return false;
    if (!is_seen) first = other;
    is_seen = true;
    if (k < 4 && is_double(other) != is_double(first)) return false;
    if (rows >= 0 && other.shape[0] != rows) return false;
    rows = other.shape[0];
    if (column.axes == 2) column.width = other.shape[1];
  }
  for (PyObject* const name : {TARDKD_NAME("student_levels"), TARDKD_NAME("teacher_levels"),
                               TARDKD_NAME("student_scores"), TARDKD_NAME("teacher_scores")})
    if (!attribute(inputs, name).is_none()) return false;
  const int64_t classes = columns[0].width - (activation == "softmax");
  const auto tells_apart = [&](int64_t width) {
    return width == 4 || width == 4 * classes || width == 4 * (classes + 1);
  };
  return (activation == "softmax" || activation == "sigmoid") && classes >= 1 && columns[0].width == columns[1].width &&
         tells_apart(columns[2].width) && tells_apart(columns[3].width) && columns[4].width == 5 &&
         columns[6].width == 4;
}

}  // namespace tardkd
