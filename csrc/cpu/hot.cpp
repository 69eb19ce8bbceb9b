// The inner loops, compiled once per instruction set (see hot.h).
//
// A region is pooled as Wy F Wx^T, one output row at a time: its few feature rows are collapsed into one row (Wy),
// which is then collapsed into the row's bins (Wx). Channels are the vector lanes of the second step. The first step
// reads whatever layout the map has: NCHW rows are vectors along x, transposed in registers after the collapse;
// channels_last pixels are lanes already. The gradient runs the same steps backwards. A task owns a block of
// channels of one image and level, gradient map included, so nothing needs atomics and every sum has a fixed order.
#include "hot.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../core/penalty.h"
#include "simd.h"

#ifndef TARDKD_ISA
#error "TARDKD_ISA names the instruction set this file is compiled for"
#endif

namespace tardkd::cpu {
namespace {

// Calls f with a null pointer of the stored type. Inputs are all float64, or none is.
template <class A, class F>
auto with_type(DType dtype, const F& f) {
  if constexpr (sizeof(A) == 8) {
    return f(static_cast<const double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::float16:
        return f(static_cast<const float16*>(nullptr));
      case DType::bfloat16:
        return f(static_cast<const bfloat16*>(nullptr));
      default:
        return f(static_cast<const float*>(nullptr));
    }
  }
}

enum class Layout { planar, lanes, strided };

Layout layout_of(const FeatureMap& map, int lanes, int channels, int span) {
  if (channels == lanes && map.stride_c == 1) return Layout::lanes;
  if (channels == lanes && map.stride_w == 1 && span % kLanes == 0) return Layout::planar;
  return Layout::strided;
}

// ---- Wy: rows of the map to one row of `span` pixels x L channels ------------------------------------------------

// s and t point at the block's first channel of the image; with kSubtract the rows of s - t are collapsed.
template <class T, class A, int L, bool kSubtract>
void collapse_rows(const FeatureMap& map, const T* s, const T* t, const Window<A>& window, int bin, int channels,
                   A* row) {
  const int begin = window.y.begin[bin], end = window.y.begin[bin + 1], span = window.x.span;
  const int64_t origin = window.y.first * map.stride_h + window.x.first * map.stride_w;
  switch (layout_of(map, L, channels, span)) {
    case Layout::planar:
      for (int x = 0; x < span; x += kLanes)
        for (int c0 = 0; c0 < L; c0 += kLanes) {
          Vec<A> sum[kLanes] = {};
          for (int k = begin; k < end; ++k) {
            const int64_t at = origin + window.y.pixel[k] * map.stride_h + x + c0 * map.stride_c;
            const Vec<A> weight = broadcast(window.y.weight[k]);
#pragma GCC unroll 8
            for (int c = 0; c < kLanes; ++c) {
              Vec<A> value = Loader<A, T>::load8(s + at + c * map.stride_c);
              if (kSubtract) value -= Loader<A, T>::load8(t + at + c * map.stride_c);
              sum[c] += weight * value;
            }
          }
          transpose8<A>(sum);
          for (int k = 0; k < kLanes; ++k) store(row + (x + k) * L + c0, sum[k]);
        }
      break;
    case Layout::lanes:
      for (int x = 0; x < span; ++x) {
        Vec<A> sum[L / kLanes] = {};
        for (int k = begin; k < end; ++k) {
          const int64_t at = origin + window.y.pixel[k] * map.stride_h + x * map.stride_w;
          const Vec<A> weight = broadcast(window.y.weight[k]);
          for (int v = 0; v < L / kLanes; ++v) {
            Vec<A> value = Loader<A, T>::load8(s + at + v * kLanes);
            if (kSubtract) value -= Loader<A, T>::load8(t + at + v * kLanes);
            sum[v] += weight * value;
          }
        }
        for (int v = 0; v < L / kLanes; ++v) store(row + x * L + v * kLanes, sum[v]);
      }
      break;
    case Layout::strided:
      std::memset(row, 0, sizeof(A) * span * L);
      for (int k = begin; k < end; ++k)
        for (int c = 0; c < channels; ++c) {
          const int64_t at = origin + window.y.pixel[k] * map.stride_h + c * map.stride_c;
          for (int x = 0; x < span; ++x) {
            A value = load_as<A>(s + at + x * map.stride_w);
            if (kSubtract) value -= load_as<A>(t + at + x * map.stride_w);
            row[x * L + c] += window.y.weight[k] * value;
          }
        }
      break;
  }
}

// Adds one row's gradient to the rows it was collapsed from.
template <class A, int L>
void spread_rows(const FeatureMap& map, A* grad, const Window<A>& window, int bin, int channels, const A* row) {
  const int begin = window.y.begin[bin], end = window.y.begin[bin + 1], span = window.x.span;
  const int64_t origin = window.y.first * map.stride_h + window.x.first * map.stride_w;
  switch (layout_of(map, L, channels, span)) {
    case Layout::planar:
      for (int x = 0; x < span; x += kLanes)
        for (int c0 = 0; c0 < L; c0 += kLanes) {
          Vec<A> value[kLanes];
          for (int k = 0; k < kLanes; ++k) value[k] = load(row + (x + k) * L + c0);
          transpose8<A>(value);
          for (int k = begin; k < end; ++k) {
            A* at = grad + origin + window.y.pixel[k] * map.stride_h + x + c0 * map.stride_c;
            const Vec<A> weight = broadcast(window.y.weight[k]);
#pragma GCC unroll 8
            for (int c = 0; c < kLanes; ++c)
              store(at + c * map.stride_c, load(at + c * map.stride_c) + weight * value[c]);
          }
        }
      break;
    case Layout::lanes:
      for (int k = begin; k < end; ++k) {
        A* at = grad + origin + window.y.pixel[k] * map.stride_h;
        const Vec<A> weight = broadcast(window.y.weight[k]);
        for (int x = 0; x < span; ++x, at += map.stride_w)
          for (int v = 0; v < L; v += kLanes) store(at + v, load(at + v) + weight * load(row + x * L + v));
      }
      break;
    case Layout::strided:
      for (int k = begin; k < end; ++k)
        for (int c = 0; c < channels; ++c) {
          A* at = grad + origin + window.y.pixel[k] * map.stride_h + c * map.stride_c;
          for (int x = 0; x < span; ++x) at[x * map.stride_w] += window.y.weight[k] * row[x * L + c];
        }
      break;
  }
}

// ---- Wx: a row of pixels to a row of bins, and back ----------------------------------------------------------------

template <class A, int L>
void collapse_columns(const Axis<A>& axis, int bins, const A* row, A* out) {
  for (int j = 0; j < bins; ++j) {
    Vec<A> sum[L / kLanes] = {};
    for (int k = axis.begin[j]; k < axis.begin[j + 1]; ++k) {
      const Vec<A> weight = broadcast(axis.weight[k]);
      for (int v = 0; v < L / kLanes; ++v) sum[v] += weight * load(row + axis.pixel[k] * L + v * kLanes);
    }
    for (int v = 0; v < L / kLanes; ++v) store(out + j * L + v * kLanes, sum[v]);
  }
}

template <class A, int L>
void spread_columns(const Axis<A>& axis, int bins, const A* out, A* row) {
  std::memset(row, 0, sizeof(A) * axis.span * L);
  for (int j = 0; j < bins; ++j)
    for (int k = axis.begin[j]; k < axis.begin[j + 1]; ++k) {
      const Vec<A> weight = broadcast(axis.weight[k]);
      A* at = row + axis.pixel[k] * L;
      for (int v = 0; v < L; v += kLanes) store(at + v, load(at + v) + weight * load(out + j * L + v));
    }
}

// ---- one region ----------------------------------------------------------------------------------------------------

template <class A, int L>
using PoolRegion = void (*)(const PoolJob<A>&, const FeatureMap&, const void*, const void*, int64_t, int64_t,
                            const Window<A>&, int, A*, A*);

template <class T, class A, int L, bool kSubtract>
void pool_region(const PoolJob<A>& job, const FeatureMap& map, const void* s, const void* t, int64_t offset_s,
                 int64_t offset_t, const Window<A>& window, int channels, A* row, A* out) {
  for (int i = 0; i < job.pooled_h; ++i) {
    collapse_rows<T, A, L, kSubtract>(map, static_cast<const T*>(s) + offset_s,
                                      static_cast<const T*>(t) + (kSubtract ? offset_t : 0), window, i, channels, row);
    collapse_columns<A, L>(window.x, job.pooled_w, row, out + i * job.pooled_w * L);
  }
}

template <class A, int L, bool kSubtract>
PoolRegion<A, L> pool_region_for(DType dtype) {
  return with_type<A>(
      dtype, [](auto* t) -> PoolRegion<A, L> { return pool_region<std::decay_t<decltype(*t)>, A, L, kSubtract>; });
}

// Standardises what was pooled from channels [c0, c0 + channels) of a map, as if the map had been: a sample outside of
// it stays zero, so that a bin's mean counts as much as its samples do.
template <class A, int L>
void standardise(const FeatureMap& map, int c0, int channels, const Window<A>& window, int pooled_h, int pooled_w,
                 A* out) {
  const ChannelNorm<A> norm(map.norm, map.channels);
  A scale[L] = {}, mean[L] = {};
  std::memcpy(scale, norm.scale + c0, sizeof(A) * channels);
  std::memcpy(mean, norm.mean + c0, sizeof(A) * channels);
  const auto total = [](const Axis<A>& axis, int bin) {
    A sum = 0;
    for (int k = axis.begin[bin]; k < axis.begin[bin + 1]; ++k) sum += axis.weight[k];
    return sum;
  };
  for (int i = 0; i < pooled_h; ++i) {
    const A along_y = total(window.y, i);
    for (int j = 0; j < pooled_w; ++j, out += L) {
      const A weight = along_y * total(window.x, j);
      for (int l = 0; l < L; ++l) out[l] = scale[l] * (out[l] - weight * mean[l]);
    }
  }
}

// Sum of b rho(d) over bins x lanes; d becomes slope * b * rho'(d).
template <class A, int L, FeatureLoss kKind>
A penalise(A* d, int bins, const A* bin_weights, A beta, A slope) {
  A sums[L] = {};
  for (int k = 0; k < bins; ++k, d += L) {
    const A b = bin_weights ? bin_weights[k] : A(1);
    for (int l = 0; l < L; ++l) {
      sums[l] += b * penalty(kKind, d[l], beta);
      d[l] = slope * b * penalty_slope(kKind, d[l], beta);
    }
  }
  A total = 0;
  for (int l = 0; l < L; ++l) total += sums[l];
  return total;
}

template <class A, int L>
A penalise(FeatureLoss kind, A* d, int bins, const A* bin_weights, A beta, A slope) {
  switch (kind) {
    case FeatureLoss::squared:
      return penalise<A, L, FeatureLoss::squared>(d, bins, bin_weights, beta, slope);
    case FeatureLoss::absolute:
      return penalise<A, L, FeatureLoss::absolute>(d, bins, bin_weights, beta, slope);
    default:
      return penalise<A, L, FeatureLoss::smooth_l1>(d, bins, bin_weights, beta, slope);
  }
}

// ---- a task: one channel block of one image and level ---------------------------------------------------------------

template <class A>
void zero_block(const FeatureMap& map, A* grad, int channels) {
  if (map.stride_c == 1 && map.stride_w >= channels) {
    for (int y = 0; y < map.height; ++y)
      for (int x = 0; x < map.width; ++x)
        std::memset(grad + y * map.stride_h + x * map.stride_w, 0, sizeof(A) * channels);
    return;
  }
  for (int c = 0; c < channels; ++c)  // the driver's gradient maps are dense: anything else is NCHW
    std::memset(grad + c * map.stride_c, 0, sizeof(A) * map.height * map.width);
}

template <class A, int L>
void pool_task(const PoolJob<A>& job, int32_t image, int32_t level, int32_t block, A* scratch) {
  const Pyramid& student = *job.student;
  const FeatureMap& map = student.level[level];
  const int c0 = block * L, bins = job.pooled_h * job.pooled_w;
  const int channels = map.channels - c0 < L ? map.channels - c0 : L;
  const int64_t group = int64_t(image) * student.levels + level;
  const int64_t begin = job.group_begin[group], end = job.group_begin[group + 1];

  A* grad = nullptr;
  const FeatureMap* grad_map = nullptr;
  if (job.grad) {
    grad_map = &job.grad->level[level];
    grad = static_cast<A*>(grad_map->data) + offset_in(*grad_map, image, c0, 0, 0);
    if (!job.add) zero_block(*grad_map, grad, channels);
  }

  A* out = scratch;
  A* other = out + bins * L;
  A* row = other + bins * L;
  const auto pool_student =
      job.same_geometry ? pool_region_for<A, L, true>(student.dtype) : pool_region_for<A, L, false>(student.dtype);
  const auto pool_teacher =
      job.teacher && !job.same_geometry ? pool_region_for<A, L, false>(job.teacher->dtype) : nullptr;
  const int64_t offset_s = offset_in(map, image, c0, 0, 0);

  for (int64_t r = begin; r < end; ++r) {
    const PooledRegion<A>& region = job.regions[r];
    A slope = 0;
    if (job.grad_pooled) {
      const A* from = job.grad_pooled + (region.region * map.channels + c0) * bins;
      std::memset(out, 0, sizeof(A) * bins * L);
      for (int c = 0; c < channels; ++c)
        for (int k = 0; k < bins; ++k) out[k * L + c] = from[c * bins + k];
    } else {
      const FeatureMap* twin = job.same_geometry ? &job.teacher->level[level] : nullptr;
      pool_student(job, map, map.data, twin ? twin->data : nullptr, offset_s,
                   twin ? offset_in(*twin, image, c0, 0, 0) : 0, region.student, channels, row, out);
      if (map.norm) standardise<A, L>(map, c0, channels, region.student, job.pooled_h, job.pooled_w, out);
      if (pool_teacher) {
        const FeatureMap& there = job.teacher->level[region.teacher.level];
        pool_teacher(job, there, there.data, nullptr, offset_in(there, image, c0, 0, 0), 0, region.teacher, channels,
                     row, other);
        if (there.norm) standardise<A, L>(there, c0, channels, region.teacher, job.pooled_h, job.pooled_w, other);
        for (int k = 0; k < bins * L; ++k) out[k] -= other[k];
      }
      if (job.pooled) {
        A* to = job.pooled + (region.region * map.channels + c0) * bins;
        for (int c = 0; c < channels; ++c)
          for (int k = 0; k < bins; ++k) to[c * bins + k] = out[k * L + c];
      }
      if (job.partial) {
        slope = job.slope[r];
        job.partial[block * job.group_begin[int64_t(student.images) * student.levels] + r] = penalise<A, L>(
            job.feature_loss, out, bins, job.bin_weights ? job.bin_weights + r * bins : nullptr, job.beta, slope);
      }
    }
    if (grad && (job.grad_pooled || slope != A(0)))
      for (int i = 0; i < job.pooled_h; ++i) {
        spread_columns<A, L>(region.student.x, job.pooled_w, out + i * job.pooled_w * L, row);
        spread_rows<A, L>(*grad_map, grad, region.student, i, channels, row);
      }
  }
}

template <class A>
void pool_task_any(const PoolJob<A>& job, int32_t image, int32_t level, int32_t block, A* scratch) {
  if (job.lanes == 16)
    pool_task<A, 16>(job, image, level, block, scratch);
  else
    pool_task<A, 8>(job, image, level, block, scratch);
}

template <class A>
int64_t pool_scratch(const PoolJob<A>& job) {
  return int64_t(job.lanes) * (2 * job.pooled_h * job.pooled_w + job.max_span);
}

// ---- losses on pooled regions ---------------------------------------------------------------------------------------

// `count` consecutive elements; bin_weights, where given, run along with them.
template <class S, class T, class A, FeatureLoss kKind>
A pooled_run(const S* s, const T* t, A* grad, int count, const A* bin_weights, A beta, A slope) {
  A sums[16] = {};
  int k = 0;
  for (; k + 16 <= count; k += 16)
    for (int l = 0; l < 16; ++l) {
      const A d = load_as<A>(s + k + l) - load_as<A>(t + k + l), b = bin_weights ? bin_weights[k + l] : A(1);
      sums[l] += b * penalty(kKind, d, beta);
      if (grad) grad[k + l] = slope * b * penalty_slope(kKind, d, beta);
    }
  for (; k < count; ++k) {
    const A d = load_as<A>(s + k) - load_as<A>(t + k), b = bin_weights ? bin_weights[k] : A(1);
    sums[0] += b * penalty(kKind, d, beta);
    if (grad) grad[k] = slope * b * penalty_slope(kKind, d, beta);
  }
  A total = 0;
  for (int l = 0; l < 16; ++l) total += sums[l];
  return total;
}

// The same of standardised features. The norms run along with the elements, or stand for all of them with kSame.
template <class S, class T, class A, FeatureLoss kKind, bool kSame>
A standardised_run(const S* s, const T* t, A* grad, int count, const ChannelNorm<A>& of_s, const ChannelNorm<A>& of_t,
                   int first, const A* bin_weights, A beta, A slope) {
  A sums[16] = {};
  for (int begin = 0; begin < count; begin += 16)
    for (int l = 0; l < 16 && begin + l < count; ++l) {
      const int k = begin + l, c = first + (kSame ? 0 : k);
      const A d =
          of_s.scale[c] * (load_as<A>(s + k) - of_s.mean[c]) - of_t.scale[c] * (load_as<A>(t + k) - of_t.mean[c]);
      const A b = bin_weights ? bin_weights[k] : A(1);
      sums[l] += b * penalty(kKind, d, beta);
      if (grad) grad[k] = slope * b * penalty_slope(kKind, d, beta);
    }
  A total = 0;
  for (int l = 0; l < 16; ++l) total += sums[l];
  return total;
}

template <class S, class T, class A, FeatureLoss kKind>
void pooled_region(const PooledLossJob<A>& job, int64_t r) {
  const int channels = job.student.channels, bins = job.student.pooled_h * job.student.pooled_w;
  const S* s = static_cast<const S*>(job.student.data) + r * job.student.strides[0];
  const T* t = static_cast<const T*>(job.teacher.data) + r * job.teacher.strides[0];
  A* grad = job.grad.data ? static_cast<A*>(job.grad.data) + r * job.grad.strides[0] : nullptr;
  const A* bin_weights = job.bin_weights ? job.bin_weights + r * bins : nullptr;
  if (!job.open[3 * r]) {
    job.sums[r] = 0;
    // Dense in either layout, so one fill covers the region.
    if (grad) std::memset(grad, 0, sizeof(A) * channels * bins);
    return;
  }
  // The driver hands over tensors whose channels (NCHW) or bins (channels_last) are the outer of two dense loops.
  const bool bins_inside = job.student.strides[2] == 1;
  const int inner = bins_inside ? bins : channels, outer = bins_inside ? channels : bins;
  A total = 0;
  if (job.student.norm) {
    const ChannelNorm<A> of_s(job.student.norm, channels), of_t(job.teacher.norm, channels);
    for (int k = 0; k < outer; ++k, s += inner, t += inner, grad += grad ? inner : 0)
      if (bins_inside) {
        total += standardised_run<S, T, A, kKind, true>(s, t, grad, inner, of_s, of_t, k, bin_weights, job.beta,
                                                        job.slope[r]);
      } else {
        const A weight = bin_weights ? bin_weights[k] : A(1);
        total += weight * standardised_run<S, T, A, kKind, false>(s, t, grad, inner, of_s, of_t, 0, nullptr, job.beta,
                                                                  job.slope[r] * weight);
      }
  } else if (!bin_weights)
    total = pooled_run<S, T, A, kKind>(s, t, grad, inner * outer, nullptr, job.beta, job.slope[r]);
  else
    for (int k = 0; k < outer; ++k, s += inner, t += inner, grad += grad ? inner : 0) {
      const A weight = bins_inside ? A(1) : bin_weights[k];
      total += weight * pooled_run<S, T, A, kKind>(s, t, grad, inner, bins_inside ? bin_weights : nullptr, job.beta,
                                                   job.slope[r] * weight);
    }
  job.sums[r] = total;
}

template <class S, class T, class A>
void pooled_region_kind(const PooledLossJob<A>& job, int64_t r) {
  switch (job.feature_loss) {
    case FeatureLoss::squared:
      return pooled_region<S, T, A, FeatureLoss::squared>(job, r);
    case FeatureLoss::absolute:
      return pooled_region<S, T, A, FeatureLoss::absolute>(job, r);
    case FeatureLoss::smooth_l1:
      return pooled_region<S, T, A, FeatureLoss::smooth_l1>(job, r);
  }
}

template <class A>
void pooled_loss_region(const PooledLossJob<A>& job, int64_t region) {
  with_type<A>(job.student.dtype, [&](auto* s) {
    with_type<A>(job.teacher.dtype, [&](auto* t) {
      pooled_region_kind<std::decay_t<decltype(*s)>, std::decay_t<decltype(*t)>, A>(job, region);
    });
  });
}

// ---- standardised channels ------------------------------------------------------------------------------------------

// Adds up x - pivot and its square along `count` elements of one channel.
template <class T, class A>
void add_moments(const T* x, int64_t step, int count, A pivot, double& sum, double& square) {
  Vec<A> s{}, q{};
  A rest = 0, rest_square = 0;
  int k = 0;
  if (step == 1)
    for (; k + kLanes <= count; k += kLanes) {
      const Vec<A> d = Loader<A, T>::load8(x + k) - broadcast(pivot);
      s += d;
      q += d * d;
    }
  for (; k < count; ++k) {
    const A d = load_as<A>(x + k * step) - pivot;
    rest += d;
    rest_square += d * d;
  }
  for (int l = 0; l < kLanes; ++l) rest += s[l], rest_square += q[l];
  sum += rest;
  square += rest_square;
}

// Rows are added up in A, and the sums of rows in double. A value of the channel is taken off first: where the mean is
// large beside the deviation, little is left of the squares' difference.
template <class T, class A>
void channel_norms(const FeatureMap& map, int images, int c0, int channels, double epsilon, A* scale, A* mean) {
  const T* data = static_cast<const T*>(map.data) + c0 * map.stride_c;
  A pivot[kLanes] = {};
  double sum[kLanes] = {}, square[kLanes] = {};
  const double count = double(images) * map.height * map.width;
  for (int l = 0; l < channels && count > 0; ++l) pivot[l] = load_as<A>(data + l * map.stride_c);
  if (map.stride_c == 1 && channels == kLanes) {
    const Vec<A> at = load(pivot);
    for (int n = 0; n < images; ++n)
      for (int y = 0; y < map.height; ++y) {
        const T* row = data + n * map.stride_n + y * map.stride_h;
        Vec<A> s{}, q{};
        for (int x = 0; x < map.width; ++x) {
          const Vec<A> d = Loader<A, T>::load8(row + x * map.stride_w) - at;
          s += d;
          q += d * d;
        }
        for (int l = 0; l < kLanes; ++l) sum[l] += s[l], square[l] += q[l];
      }
  } else {
    for (int l = 0; l < channels; ++l)
      for (int n = 0; n < images; ++n)
        for (int y = 0; y < map.height; ++y)
          add_moments(data + l * map.stride_c + n * map.stride_n + y * map.stride_h, map.stride_w, map.width, pivot[l],
                      sum[l], square[l]);
  }
  for (int l = 0; l < channels; ++l) {
    const double offset = count > 0 ? sum[l] / count : 0.0, spread = count > 0 ? square[l] / count : 0.0;
    const double variance = spread - offset * offset;
    scale[l] = static_cast<A>(1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + epsilon));
    mean[l] = static_cast<A>(pivot[l] + offset);
  }
}

// Adds up g and g x' along `count` elements of one channel, with x' = scale (x - mean).
template <class T, class A>
void add_products(const A* g, int64_t step_g, const T* x, int64_t step_x, int count, A scale, A mean, double& sum,
                  double& product) {
  Vec<A> s{}, p{};
  A rest = 0, rest_product = 0;
  int k = 0;
  if (step_g == 1 && step_x == 1)
    for (; k + kLanes <= count; k += kLanes) {
      const Vec<A> value = load(g + k);
      s += value;
      p += value * (broadcast(scale) * (Loader<A, T>::load8(x + k) - broadcast(mean)));
    }
  for (; k < count; ++k) {
    rest += g[k * step_g];
    rest_product += g[k * step_g] * (scale * (load_as<A>(x + k * step_x) - mean));
  }
  for (int l = 0; l < kLanes; ++l) rest += s[l], rest_product += p[l];
  sum += rest;
  product += rest_product;
}

// g becomes factor g + constant + slope (x - mean).
template <class T, class A>
void combine(A* g, int64_t step_g, const T* x, int64_t step_x, int count, A factor, A constant, A slope, A mean) {
  int k = 0;
  if (step_g == 1 && step_x == 1)
    for (; k + kLanes <= count; k += kLanes)
      store(g + k, broadcast(factor) * load(g + k) + broadcast(constant) +
                       broadcast(slope) * (Loader<A, T>::load8(x + k) - broadcast(mean)));
  for (; k < count; ++k)
    g[k * step_g] = factor * g[k * step_g] + constant + slope * (load_as<A>(x + k * step_x) - mean);
}

// With x' = scale (x - mean) the gradient for x is scale (g - mean g - x' mean(g x')), the means over the channel.
template <class T, class A>
void backward_through_norms(const FeatureMap& map, const FeatureMap& grad, int images, int c0, int channels) {
  const auto each_row = [&](int channel, const auto& f) {
    A* g = static_cast<A*>(grad.data) + channel * grad.stride_c;
    const T* x = static_cast<const T*>(map.data) + channel * map.stride_c;
    for (int n = 0; n < images; ++n)
      for (int y = 0; y < map.height; ++y)
        f(g + n * grad.stride_n + y * grad.stride_h, x + n * map.stride_n + y * map.stride_h);
  };
  const bool together = channels == kLanes && map.stride_c == 1 && grad.stride_c == 1;
  const ChannelNorm<A> norm(map.norm, map.channels);
  const A *scale = norm.scale + c0, *mean = norm.mean + c0;
  double sum[kLanes] = {}, product[kLanes] = {};
  if (together)
    each_row(c0, [&](const A* g, const T* x) {
      Vec<A> s{}, p{};
      for (int k = 0; k < map.width; ++k) {
        const Vec<A> value = load(g + k * grad.stride_w);
        s += value;
        p += value * (load(scale) * (Loader<A, T>::load8(x + k * map.stride_w) - load(mean)));
      }
      for (int l = 0; l < kLanes; ++l) sum[l] += s[l], product[l] += p[l];
    });
  else
    for (int l = 0; l < channels; ++l)
      each_row(c0 + l, [&](const A* g, const T* x) {
        add_products(g, grad.stride_w, x, map.stride_w, map.width, scale[l], mean[l], sum[l], product[l]);
      });

  const double count = double(images) * map.height * map.width;
  A constant[kLanes] = {}, slope[kLanes] = {};
  for (int l = 0; l < channels; ++l) {
    constant[l] = static_cast<A>(-scale[l] * sum[l] / count);
    slope[l] = static_cast<A>(-scale[l] * product[l] * scale[l] / count);
  }
  if (together)
    each_row(c0, [&](A* g, const T* x) {
      for (int k = 0; k < map.width; ++k) {
        A* at = g + k * grad.stride_w;
        store(at, load(scale) * load(at) + load(constant) +
                      load(slope) * (Loader<A, T>::load8(x + k * map.stride_w) - load(mean)));
      }
    });
  else
    for (int l = 0; l < channels; ++l)
      each_row(c0 + l, [&](A* g, const T* x) {
        combine(g, grad.stride_w, x, map.stride_w, map.width, scale[l], constant[l], slope[l], mean[l]);
      });
}

template <class A>
void channel_norms_any(const FeatureMap& map, DType dtype, int32_t images, int32_t channel, int32_t channels,
                       double epsilon, A* scale, A* mean) {
  with_type<A>(dtype, [&](auto* t) {
    channel_norms<std::decay_t<decltype(*t)>, A>(map, images, channel, channels, epsilon, scale, mean);
  });
}

template <class A>
void backward_through_norms_any(const FeatureMap& map, DType dtype, const FeatureMap& grad, int32_t images,
                                int32_t channel, int32_t channels) {
  with_type<A>(dtype, [&](auto* t) {
    backward_through_norms<std::decay_t<decltype(*t)>, A>(map, grad, images, channel, channels);
  });
}

// ---- Gaussian-mask loss ---------------------------------------------------------------------------------------------

// A run is `count` consecutive pixels of a row; the mask's zeros keep a NaN between two boxes out.
template <class S, class T, class A>
void add_loss(const S* s, const T* t, const A* mask, int count, Vec<A>& sum, A& rest) {
  int x = 0;
  for (; x + kLanes <= count; x += kLanes) {
    const Vec<A> m = load(mask + x), d = Loader<A, S>::load8(s + x) - Loader<A, T>::load8(t + x);
    const Vec<A> inside = m != Vec<A>{} ? d : Vec<A>{};
    sum += m * inside * inside;
  }
  for (; x < count; ++x)
    if (mask[x] != A(0)) {
      const A d = load_as<A>(s + x) - load_as<A>(t + x);
      rest += mask[x] * d * d;
    }
}

template <class S, class T, class A>
void write_gradient(const S* s, const T* t, A* grad, const A* mask, int count, A slope) {
  int x = 0;
  for (; x + kLanes <= count; x += kLanes) {
    const Vec<A> m = load(mask + x), d = Loader<A, S>::load8(s + x) - Loader<A, T>::load8(t + x);
    store(grad + x, broadcast(slope) * m * (m != Vec<A>{} ? d : Vec<A>{}));
  }
  for (; x < count; ++x) grad[x] = mask[x] == A(0) ? A(0) : slope * mask[x] * (load_as<A>(s + x) - load_as<A>(t + x));
}

// One band of one image, on both sides and in the gradient.
template <class S, class T, class A>
struct Band {
  const GaussianJob<A>& job;
  const S* s;
  const T* t;
  A* g;
  int width;

  Band(const GaussianJob<A>& j, int32_t image, int32_t row)
      : job(j),
        s(static_cast<const S*>(j.student.data) + offset_in(j.student, image, 0, row, 0)),
        t(static_cast<const T*>(j.teacher.data) + offset_in(j.teacher, image, 0, row, 0)),
        g(j.grad.data ? static_cast<A*>(j.grad.data) + offset_in(j.grad, image, 0, row, 0) : nullptr),
        width(j.student.width) {}

  const S* student(int c, int y, int x) const { return s + offset_in(job.student, 0, c, y, x); }
  const T* teacher(int c, int y, int x) const { return t + offset_in(job.teacher, 0, c, y, x); }
  A* grad(int c, int y, int x) const { return g + offset_in(job.grad, 0, c, y, x); }
};

template <class S, class T, class A>
double gaussian_loss(const Band<S, T, A>& band, int rows, const A* mask, const int32_t* extent) {
  const FeatureMap &sm = band.job.student, &tm = band.job.teacher;
  const int channels = band.job.channels, width = band.width;
  double total = 0;
  if (sm.stride_c == 1 && tm.stride_c == 1) {
    for (int y = 0; y < rows; ++y)
      for (int x = extent[2 * y]; x < extent[2 * y + 1]; ++x)
        if (const A m = mask[y * width + x]; m != A(0))
          total += m * pooled_run<S, T, A, FeatureLoss::squared>(band.student(0, y, x), band.teacher(0, y, x), nullptr,
                                                                 channels, nullptr, A(0), A(0));
    return total;
  }
  const bool dense = sm.stride_w == 1 && tm.stride_w == 1;
  for (int c = 0; c < channels; ++c) {
    Vec<A> sum{};
    A rest = 0;
    for (int y = 0; y < rows; ++y) {
      const int x0 = extent[2 * y], x1 = extent[2 * y + 1], step = dense ? x1 - x0 : 1;
      for (int x = x0; x < x1; x += step)
        add_loss<S, T, A>(band.student(c, y, x), band.teacher(c, y, x), mask + y * width + x, step, sum, rest);
    }
    for (int l = 0; l < kLanes; ++l) rest += sum[l];
    total += rest;
  }
  return total;
}

// The driver's gradient maps are dense: channels_last, or else NCHW.
template <class S, class T, class A>
void gaussian_gradient(const Band<S, T, A>& band, int rows, const A* mask, const int32_t* extent) {
  const FeatureMap &sm = band.job.student, &tm = band.job.teacher, &gm = band.job.grad;
  const int channels = band.job.channels, width = band.width;
  if (gm.stride_c == 1 && gm.stride_w == channels) {
    const bool dense = sm.stride_c == 1 && tm.stride_c == 1;
    for (int y = 0; y < rows; ++y) {
      const int x0 = extent[2 * y], x1 = extent[2 * y + 1];
      std::memset(band.grad(0, y, 0), 0, sizeof(A) * channels * x0);
      std::memset(band.grad(0, y, x1), 0, sizeof(A) * channels * (width - x1));
      for (int x = x0; x < x1; ++x) {
        const A m = mask[y * width + x], slope = A(0.5) * band.job.slope * m;
        A* to = band.grad(0, y, x);
        if (m == A(0))
          std::memset(to, 0, sizeof(A) * channels);
        else if (dense)
          pooled_run<S, T, A, FeatureLoss::squared>(band.student(0, y, x), band.teacher(0, y, x), to, channels, nullptr,
                                                    A(0), slope);
        else
          for (int c = 0; c < channels; ++c)
            pooled_run<S, T, A, FeatureLoss::squared>(band.student(c, y, x), band.teacher(c, y, x), to + c, 1, nullptr,
                                                      A(0), slope);
      }
    }
    return;
  }
  const bool dense = sm.stride_w == 1 && tm.stride_w == 1;
  for (int c = 0; c < channels; ++c) {
    std::memset(band.grad(c, 0, 0), 0, sizeof(A) * rows * width);
    for (int y = 0; y < rows; ++y) {
      const int x0 = extent[2 * y], x1 = extent[2 * y + 1], step = dense ? x1 - x0 : 1;
      for (int x = x0; x < x1; x += step)
        write_gradient<S, T, A>(band.student(c, y, x), band.teacher(c, y, x), band.grad(c, y, x), mask + y * width + x,
                                step, band.job.slope);
    }
  }
}

// Calls f(band) with a Band of the stored types.
template <class A, class F>
auto with_band(const GaussianJob<A>& job, int32_t image, int32_t row, const F& f) {
  return with_type<A>(job.student_dtype, [&](auto* s) {
    return with_type<A>(job.teacher_dtype, [&](auto* t) {
      return f(Band<std::decay_t<decltype(*s)>, std::decay_t<decltype(*t)>, A>(job, image, row));
    });
  });
}

template <class A>
double gaussian_loss_any(const GaussianJob<A>& job, int32_t image, int32_t row, int32_t rows, const A* mask,
                         const int32_t* extent) {
  return with_band(job, image, row, [&](const auto& band) { return gaussian_loss(band, rows, mask, extent); });
}

template <class A>
void gaussian_gradient_any(const GaussianJob<A>& job, int32_t image, int32_t row, int32_t rows, const A* mask,
                           const int32_t* extent) {
  with_band(job, image, row, [&](const auto& band) { gaussian_gradient(band, rows, mask, extent); });
}

}  // namespace

namespace TARDKD_ISA {

extern const Kernels<float> float_kernels{pool_scratch<float>,
                                          pool_task_any<float>,
                                          pooled_loss_region<float>,
                                          channel_norms_any<float>,
                                          backward_through_norms_any<float>,
                                          gaussian_loss_any<float>,
                                          gaussian_gradient_any<float>};
extern const Kernels<double> double_kernels{pool_scratch<double>,
                                            pool_task_any<double>,
                                            pooled_loss_region<double>,
                                            channel_norms_any<double>,
                                            backward_through_norms_any<double>,
                                            gaussian_loss_any<double>,
                                            gaussian_gradient_any<double>};

}  // namespace TARDKD_ISA
}  // namespace tardkd::cpu
