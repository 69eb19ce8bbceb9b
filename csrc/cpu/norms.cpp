// The statistics that standardise channels, and the gradient through them.
#include "hot.h"
#include "kernels.h"
#include "parallel.h"

namespace tardkd::cpu {
namespace {

constexpr int32_t kChannels = 8;  // of a task

// Calls body(level, first channel, channels, where the norms of the level begin) for every few channels of every level.
template <class Body>
void for_channels(const Pyramid& features, int threads, const Body& body) {
  const int64_t blocks = (features.max_channels + kChannels - 1) / kChannels;
  int64_t first[kMaxLevels] = {};
  for (int32_t level = 1; level < features.levels; ++level)
    first[level] = first[level - 1] + 2 * int64_t(features.level[level - 1].channels);
  for_each_task(features.levels * blocks, threads, [&](int64_t task, int) {
    const int32_t level = static_cast<int32_t>(task / blocks),
                  channel = static_cast<int32_t>(task % blocks) * kChannels;
    const int32_t left = features.level[level].channels - channel;
    if (left > 0) body(level, channel, left < kChannels ? left : kChannels, first[level]);
  });
}

}  // namespace

template <class A>
void channel_norms(const Pyramid& features, double epsilon, A* norms, int threads) {
  const Kernels<A>& hot = kernels(A());
  for_channels(features, threads, [&](int32_t level, int32_t channel, int32_t channels, int64_t first) {
    const FeatureMap& map = features.level[level];
    A* scale = norms + first + channel;
    hot.channel_norms(map, features.dtype, features.images, channel, channels, epsilon, scale, scale + map.channels);
  });
}

template <class A>
void backward_through_norms(const Pyramid& features, const Pyramid& grad, int threads) {
  const Kernels<A>& hot = kernels(A());
  for_channels(features, threads, [&](int32_t level, int32_t channel, int32_t channels, int64_t) {
    hot.backward_through_norms(features.level[level], features.dtype, grad.level[level], features.images, channel,
                               channels);
  });
}

#define TARDKD_INSTANTIATE(A)                                      \
  template void channel_norms<A>(const Pyramid&, double, A*, int); \
  template void backward_through_norms<A>(const Pyramid&, const Pyramid&, int)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cpu
