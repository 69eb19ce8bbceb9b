#include "launch.h"

namespace ptx_on_cpu {
namespace {

struct Tracker {
  Launch& launch;
  int32_t thread;

  bool in_this_block(int32_t other) const {
    return uint32_t(other) / launch.block_threads == uint32_t(thread) / launch.block_threads;
  }

  // Whether what `other` did, after so many barriers and so on, comes before what this thread does now.
  bool comes_before(int32_t other, uint32_t barriers, uint32_t epoch, uint32_t fences) const {
    if (other == thread) return true;
    if (in_this_block(other)) {
      if (barriers != launch.barriers) return true;
      return other / kLanes == thread / kLanes && epoch != launch.warp->epoch;  // whole warps make a block here
    }
    const Launch::Meeting& sent = launch.releases[uint32_t(other) / launch.block_threads];
    const bool is_sent = sent.thread >= 0 && (sent.barriers > barriers || sent.thread == other) &&
                         (sent.has_fence || launch.fences[size_t(other)] > fences);
    const Launch::Meeting& got = launch.acquired;
    return is_sent && got.thread >= 0 && (got.barriers < launch.barriers || got.thread == thread);
  }
  bool is_after_write(const Shadow& shadow) const {
    return comes_before(shadow.writer, shadow.write_barriers, shadow.write_epoch, shadow.write_fences);
  }
  bool is_after_reads(const Shadow& shadow) const {
    if (shadow.reader == Shadow::kSeveral) return shadow.read_barriers != launch.barriers;
    return comes_before(shadow.reader, shadow.read_barriers, shadow.read_epoch, 0);
  }
};

}  // namespace

void track(Launch& launch, const Instruction& i, Shadow& shadow, uint64_t stamp, int32_t thread, bool writes) {
  if (shadow.stamp != stamp) {
    shadow = Shadow{};
    shadow.stamp = stamp;
  }
  const Tracker tracker{launch, thread};
  const bool both_atomic = i.is_atomic && shadow.atomic;
  const auto blame = [&](const std::string& kind, int32_t other) {
    const bool within = other == Shadow::kSeveral || tracker.in_this_block(other);
    launch.blame(i, "race: " + kind + (within ? "" : " of another block"));
  };
  if (shadow.writer != Shadow::kNobody && !both_atomic) {
    if (!tracker.is_after_write(shadow))
      blame(writes ? "write after write" : "read after write", shadow.writer);
    else if (!writes && !i.skips_l1 && !tracker.in_this_block(shadow.writer))
      launch.blame(i, "what another block has written is read through the first-level cache");
  }
  if (writes && shadow.reader != Shadow::kNobody && !both_atomic && !tracker.is_after_reads(shadow))
    blame("write after read", shadow.reader);

  if (writes) {
    shadow.writer = thread;
    shadow.write_barriers = launch.barriers;
    shadow.write_epoch = launch.warp->epoch;
    shadow.write_fences = size_t(thread) < launch.fences.size() ? launch.fences[size_t(thread)] : 0;
    shadow.atomic = i.is_atomic;
    shadow.reader = Shadow::kNobody;
  } else {
    const bool stays =
        shadow.reader == Shadow::kSeveral && shadow.writer != Shadow::kNobody && !tracker.in_this_block(shadow.writer);
    const bool is_first = shadow.reader == Shadow::kNobody || shadow.reader == thread || tracker.is_after_reads(shadow);
    shadow.reader = is_first && !stays ? thread : Shadow::kSeveral;
    shadow.read_barriers = launch.barriers;
    shadow.read_epoch = launch.warp->epoch;
  }
}

}  // namespace ptx_on_cpu
