// Feature and gradient maps as the kernels see them: how their memory can be read.
#pragma once

#include "../core/axis.h"
#include "primitives.cuh"

namespace tardkd::cuda {

// Calls f(T()) with the type that a feature map stores when A accumulates it.
template <class A, class F>
__device__ __forceinline__ void with_stored(DType dtype, const F& f) {
  if constexpr (sizeof(A) == 8) {
    f(double());
  } else {
    switch (dtype) {
      case DType::float16:
        f(__half());
        break;
      case DType::bfloat16:
        f(__nv_bfloat16());
        break;
      default:
        f(float());
        break;
    }
  }
}

// A feature or gradient map with what the launcher found out about its memory.
struct MapView {
  FeatureMap map;
  int32_t stride_c, stride_h, stride_w;  // the map's, for loops
  bool planar;                           // pixels of a row are neighbours in memory, else (taken to be) channels
  bool vector;                           // whole quads of these neighbours can be accessed at once
};

struct PyramidView {
  MapView level[kMaxLevels];
  int32_t levels, images, max_channels;
  LevelChoice choice;
  DType dtype;
};

__host__ __device__ inline int32_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline MapView view_of(const FeatureMap& map, DType dtype) {
  MapView view{map, int32_t(map.stride_c), int32_t(map.stride_h), int32_t(map.stride_w), map.stride_c != 1, false};
  const int64_t unit = 4 * bytes_of(dtype), aligned_to = unit < 16 ? unit : 16;
  const int64_t inner = view.planar ? map.stride_w : map.stride_c, other = view.planar ? map.stride_c : map.stride_w;
  view.vector = reinterpret_cast<uintptr_t>(map.data) % aligned_to == 0 && inner == 1 && other % 4 == 0 &&
                map.stride_h % 4 == 0 && map.stride_n % 4 == 0 && (!view.planar || map.width % 4 == 0);
  return view;
}

// Within an image the kernels keep strides in 32 bits; offsets have 64.
inline bool strides_fit(const Pyramid& pyramid) {
  const auto fits = [](int64_t stride) { return stride == int64_t(int32_t(stride)); };
  for (int32_t level = 0; level < pyramid.levels; ++level) {
    const FeatureMap& map = pyramid.level[level];
    if (!fits(map.stride_c) || !fits(map.stride_h) || !fits(map.stride_w)) return false;
  }
  return true;
}

// What lies `count` strides on from `from`. In a loop the compiler would widen a stride beforehand, and then multiply
// 64 bits, which takes four instructions. (By way of an integer it would not know any more that the memory is global.)
template <class T>
__device__ __forceinline__ T* advance(T* from, int32_t count, int32_t stride) {
#ifdef TARDKD_CUDA_ON_CPU
  return from + int64_t(count) * stride;
#else
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  int64_t bytes;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(count * int32_t(sizeof(T))), "r"(stride));
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + bytes);
#endif
}

inline PyramidView view_of(const Pyramid& pyramid, const LevelChoice& choice) {
  PyramidView view{};
  view.levels = pyramid.levels;
  view.images = pyramid.images;
  view.max_channels = pyramid.max_channels;
  view.choice = choice;
  view.dtype = pyramid.dtype;
  for (int32_t level = 0; level < pyramid.levels; ++level)
    view.level[level] = view_of(pyramid.level[level], pyramid.dtype);
  return view;
}

// For regions whose levels follow from the rule, or where there are no regions.
inline PyramidView view_of(const Pyramid& pyramid) { return view_of(pyramid, level_choice(pyramid, GivenLevels{})); }

}  // namespace tardkd::cuda
