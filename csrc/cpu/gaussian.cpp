// Gaussian-mask loss. The mask of a whole level never exists: a task makes the few rows it needs from one exponential
// per box and axis, and drops them again.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/box.h"
#include "hot.h"
#include "kernels.h"
#include "parallel.h"

namespace tardkd::cpu {
namespace {

// Rows of a task: enough for long runs in NCHW planes, few enough that mask and rows of all channels stay in cache.
constexpr int32_t kBandRows = 16;

int32_t bands_of(const FeatureMap& map) { return (map.height + kBandRows - 1) / kBandRows; }

// One box on one level: the pixels it covers, and the x part of its Gaussian there.
template <class A>
struct BoxOnMap {
  int32_t x0, x1, y0, y1;  // half open
  double lo, hi;           // y extent, map pixels
  std::vector<A> along_x;
};

// First integer >= v inside [0, size], and one past the last integer <= v.
int32_t first_pixel(double v, int32_t size) {
  return static_cast<int32_t>(std::clamp(std::ceil(v), 0.0, double(size)));
}
int32_t past_pixel(double v, int32_t size) {
  return static_cast<int32_t>(std::clamp(std::floor(v) + 1.0, 0.0, double(size)));
}

// The boxes of each image, of `boxes` (count, 5) image index, x1, y1, x2, y2.
template <class A>
std::vector<std::vector<BoxOnMap<A>>> place_boxes(const FeatureMap& map, int32_t images, const Table& boxes,
                                                  int64_t count, double sigma_squared) {
  std::vector<std::vector<BoxOnMap<A>>> placed(images);
  for (int64_t b = 0; b < count; ++b) {
    const double *row = dense_row<double>(boxes, b), *box = row + 1;
    if (!is_finite(box) || !(box[2] > box[0]) || !(box[3] > box[1])) continue;
    const double lo = box[0] * map.scale, hi = box[2] * map.scale;
    BoxOnMap<A> at;
    at.lo = box[1] * map.scale;
    at.hi = box[3] * map.scale;
    at.x0 = first_pixel(lo, map.width);
    at.x1 = past_pixel(hi, map.width);
    at.y0 = first_pixel(at.lo, map.height);
    at.y1 = past_pixel(at.hi, map.height);
    if (at.x0 >= at.x1 || at.y0 >= at.y1) continue;
    for (int32_t x = at.x0; x < at.x1; ++x)
      at.along_x.push_back(static_cast<A>(axis_gaussian(x, lo, hi, sigma_squared)));
    placed[static_cast<int64_t>(row[0])].push_back(std::move(at));
  }
  return placed;
}

// Makes rows [row, row + rows) of the mask, the maximum over boxes, in `mask` (rows, width), and in `extent` (rows, 2)
// the columns of each row outside which it is zero. Returns the sum of the mask.
template <class A>
double make_mask(const std::vector<BoxOnMap<A>>& boxes, int32_t width, int32_t row, int32_t rows, double sigma_squared,
                 A* mask, int32_t* extent) {
  double sum = 0;
  std::fill(mask, mask + int64_t(rows) * width, A(0));
  for (int32_t y = 0; y < rows; ++y) {
    A* line = mask + int64_t(y) * width;
    int32_t x0 = width, x1 = 0;
    for (const BoxOnMap<A>& box : boxes) {
      if (row + y < box.y0 || row + y >= box.y1) continue;
      const A along_y = static_cast<A>(axis_gaussian(row + y, box.lo, box.hi, sigma_squared));
      for (int32_t x = box.x0; x < box.x1; ++x) line[x] = std::max(line[x], along_y * box.along_x[x - box.x0]);
      x0 = std::min(x0, box.x0);
      x1 = std::max(x1, box.x1);
    }
    extent[2 * y] = x0 < x1 ? x0 : 0;
    extent[2 * y + 1] = x0 < x1 ? x1 : 0;
    A line_sum = 0;
    for (int32_t x = x0; x < x1; ++x) line_sum += line[x];
    sum += line_sum;
  }
  return sum;
}

// Calls body(task, image, row, rows, mask, extent, sum of the mask) for every band of a level, on `threads` threads.
template <class A, class Body>
void for_bands(const FeatureMap& map, int32_t images, const Table& boxes, int64_t count, double sigma_squared,
               int threads, const Body& body) {
  const auto placed = place_boxes<A>(map, images, boxes, count, sigma_squared);
  const int32_t bands = bands_of(map);
  for_each_task(int64_t(images) * bands, threads, [&](int64_t task, int) {
    const int32_t image = static_cast<int32_t>(task / bands), row = static_cast<int32_t>(task % bands) * kBandRows;
    const int32_t rows = std::min(kBandRows, map.height - row);
    std::vector<A> mask(int64_t(rows) * map.width);
    int32_t extent[2 * kBandRows];
    const double sum = make_mask(placed[image], map.width, row, rows, sigma_squared, mask.data(), extent);
    body(task, image, row, rows, mask.data(), extent, sum);
  });
}

template <class A>
GaussianJob<A> gaussian_job(const Pyramid& student, const Pyramid& teacher, int32_t level) {
  GaussianJob<A> job{};
  job.student = student.level[level];
  job.teacher = teacher.level[level];
  job.student_dtype = student.dtype;
  job.teacher_dtype = teacher.dtype;
  job.channels = student.level[level].channels;
  return job;
}

}  // namespace

template <class A>
void gaussian_feature_loss(const Pyramid& student, const Pyramid& teacher, const Table& boxes, int64_t count,
                           double sigma_squared, A* loss, double* mask_sums, int threads) {
  const Kernels<A>& hot = kernels(A());
  double total = 0;
  for (int32_t level = 0; level < student.levels; ++level) {
    const FeatureMap& map = student.level[level];
    const GaussianJob<A> job = gaussian_job<A>(student, teacher, level);
    const int64_t tasks = int64_t(student.images) * bands_of(map);
    std::vector<double> sums(tasks), losses(tasks);
    for_bands<A>(
        map, student.images, boxes, count, sigma_squared, threads,
        [&](int64_t task, int32_t image, int32_t row, int32_t rows, const A* mask, const int32_t* extent, double sum) {
          sums[task] = sum;
          losses[task] = hot.gaussian_loss(job, image, row, rows, mask, extent);
        });
    double mask_sum = 0, sum = 0;
    for (int64_t task = 0; task < tasks; ++task) mask_sum += sums[task], sum += losses[task];
    mask_sums[level] = mask_sum;
    total += sum / (2.0 * std::max(1.0, mask_sum));
  }
  *loss = static_cast<A>(total / student.levels);
}

template <class A>
void gaussian_feature_loss_backward(const Pyramid& student, const Pyramid& teacher, const Pyramid& grad,
                                    const Table& boxes, int64_t count, double sigma_squared, const double* mask_sums,
                                    double upstream, int threads) {
  const Kernels<A>& hot = kernels(A());
  for (int32_t level = 0; level < student.levels; ++level) {
    const FeatureMap& map = student.level[level];
    GaussianJob<A> job = gaussian_job<A>(student, teacher, level);
    job.grad = grad.level[level];
    job.slope = static_cast<A>(upstream / (std::max(1.0, mask_sums[level]) * student.levels));
    for_bands<A>(map, student.images, boxes, count, sigma_squared, threads,
                 [&](int64_t, int32_t image, int32_t row, int32_t rows, const A* mask, const int32_t* extent, double) {
                   hot.gaussian_gradient(job, image, row, rows, mask, extent);
                 });
  }
}

#define TARDKD_INSTANTIATE(A)                                                                                        \
  template void gaussian_feature_loss<A>(const Pyramid&, const Pyramid&, const Table&, int64_t, double, A*, double*, \
                                         int);                                                                       \
  template void gaussian_feature_loss_backward<A>(const Pyramid&, const Pyramid&, const Pyramid&, const Table&,      \
                                                  int64_t, double, const double*, double, int)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cpu
