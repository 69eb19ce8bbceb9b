// Tests of csrc/cuda_on_cpu: that kernels run as they would on a GPU, and that broken ones are found out.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/index.cuh"
#include "cuda/primitives.cuh"

using tardkd::cuda::kAllLanes;
using tardkd::cuda::kThreads;
using tardkd::cuda::kWarp;
using tardkd::cuda::launch;
using tardkd::cuda::Shared;
using tardkd::cuda::shared_bytes;
using tardkd::cuda::SharedArena;

static int failures = 0;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (0)

// What the launch throws; empty if nothing.
template <class F>
static std::string error_of(const F& launches) {
  try {
    launches();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

static bool says(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    if (text.find(part) == std::string::npos) {
      std::printf("'%s' lacks '%s'\n", text.c_str(), part);
      return false;
    }
  return true;
}

// ---- kernels that are right ---------------------------------------------------------------------------------------

__global__ void reverse_kernel(int* data, int rounds) {
  SharedArena arena;
  const Shared<int> shared = arena.take<int>(blockDim.x);
  int* row = data + blockIdx.x * blockDim.x;
  for (int round = 0; round < rounds; ++round) {
    shared[threadIdx.x] = row[threadIdx.x];
    __syncthreads();
    row[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
    __syncthreads();
  }
}

static void test_barriers() {
  for (int workers : {1, 3}) {
    cuda_on_cpu::set_workers(workers);
    std::vector<int> data(50 * 96);
    for (size_t i = 0; i < data.size(); ++i) data[i] = int(i);
    CHECK(launch(reverse_kernel, dim3(50), 96, shared_bytes<int>(96), nullptr, data.data(), 3) == cudaSuccess);
    for (int b = 0; b < 50; ++b)
      for (int t = 0; t < 96; ++t) CHECK(data[b * 96 + t] == b * 96 + 95 - t);
  }
  cuda_on_cpu::set_workers(1);
}

__global__ void place_kernel(unsigned* places) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  places[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

static void test_places() {
  std::vector<unsigned> places(2 * 3 * 4 * 5 * 6 * 7);
  CHECK(cuda_on_cpu::launch(place_kernel, dim3(2, 3, 4), dim3(5, 6, 7), 0, places.data()) == cudaSuccess);
  for (unsigned visits : places) CHECK(visits == 1);
}

template <class T>
__global__ void shuffle_kernel(T* out) {
  const int lane = int(threadIdx.x) % kWarp;
  const T value = T(threadIdx.x) * T(3);
  T* row = out + threadIdx.x * 6;
  row[0] = __shfl_sync(kAllLanes, value, 5);
  row[1] = __shfl_sync(kAllLanes, value, lane + 1, 8);
  row[2] = __shfl_up_sync(kAllLanes, value, 3);
  row[3] = __shfl_down_sync(kAllLanes, value, 3, 16);
  row[4] = __shfl_xor_sync(kAllLanes, value, 9);
  row[5] = tardkd::cuda::warp_sum(value);
}

template <class T>
static void test_shuffle() {
  std::vector<T> out(64 * 6);
  CHECK(launch(shuffle_kernel<T>, dim3(1), 64, 0, nullptr, out.data()) == cudaSuccess);
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32, warp = t - lane;
    const T* row = &out[t * 6];
    CHECK(row[0] == T((warp + 5) * 3));
    CHECK(row[1] == T((t / 8 * 8 + (lane + 1) % 8) * 3));
    CHECK(row[2] == T((lane < 3 ? t : t - 3) * 3));
    CHECK(row[3] == T((lane % 16 + 3 < 16 ? t + 3 : t) * 3));
    CHECK(row[4] == T((warp + (lane ^ 9)) * 3));
    CHECK(row[5] == T((warp * 32 + 31 * 16) * 3));
  }
}

__global__ void vote_kernel(unsigned* out) {
  const int lane = int(threadIdx.x) % kWarp;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  unsigned* row = out + threadIdx.x * 4;
  row[0] = __ballot_sync(kAllLanes, lane % 3 == 0);
  // Two halves that take separate ways and meet again.
  row[1] = lane < 16 ? __ballot_sync(half, lane & 1) : __ballot_sync(half, true);
  row[2] = unsigned(__any_sync(half, lane == 20));
  row[3] = unsigned(__all_sync(half, lane >= 16));
  __syncwarp();
  __syncwarp(half);
}

static void test_votes() {
  std::vector<unsigned> out(64 * 4);
  CHECK(launch(vote_kernel, dim3(1), 64, 0, nullptr, out.data()) == cudaSuccess);
  for (int t = 0; t < 64; ++t) {
    const bool low = t % 32 < 16;
    CHECK(out[t * 4] == 0x49249249u);
    CHECK(out[t * 4 + 1] == (low ? 0x0000aaaau : 0xffff0000u));
    CHECK(out[t * 4 + 2] == (low ? 0u : 1u));
    CHECK(out[t * 4 + 3] == (low ? 0u : 1u));
  }
}

// Threads that are chosen write their numbers side by side, in several rounds.
__global__ void rank_kernel(int* out, int* counts) {
  SharedArena arena;
  const Shared<int32_t> scratch = arena.take<int32_t>(kThreads / kWarp);
  int written = 0;
  for (int divisor : {1, 3, 7, 1000}) {
    int32_t count;
    const int32_t rank = tardkd::cuda::block_rank(threadIdx.x % divisor == divisor - 1, scratch, count);
    if (threadIdx.x % divisor == divisor - 1) out[written + rank] = int(threadIdx.x);
    written += count;
    __syncthreads();
  }
  if (threadIdx.x == 0) *counts = written;
}

static void test_ranks() {
  std::vector<int> expected, out(4 * kThreads, -1);
  for (int divisor : {1, 3, 7, 1000})
    for (int t = divisor - 1; t < kThreads; t += divisor) expected.push_back(t);
  int count = 0;
  CHECK(launch(rank_kernel, dim3(1), kThreads, shared_bytes<int32_t>(kThreads / kWarp), nullptr, out.data(), &count) ==
        cudaSuccess);
  out.resize(expected.size());
  CHECK(out == expected && count == int(expected.size()));
}

// Around every multiple near both ends, for divisors of all magnitudes.
static void test_dividers() {
  const int64_t top = 0x7fffffff;
  std::vector<int64_t> divisors;
  for (int64_t d = 1; d <= 300; ++d) divisors.push_back(d);
  for (int64_t power = 1; power <= 1 << 30; power *= 2)
    for (int64_t d = power - 1; d <= power + 1; ++d)
      if (d > 0) divisors.push_back(d);
  divisors.push_back(top - 1);
  divisors.push_back(top);
  for (int64_t d : divisors) {
    const tardkd::cuda::Divider divider{int32_t(d)}, in_block = tardkd::cuda::Divider::in_block(int32_t(d));
    for (int64_t multiple : {int64_t(0), d, 2 * d, 49 * d, top / d * d, top / 2 / d * d, top / d / d * d})
      for (int64_t x = multiple - 2; x <= multiple + 2; ++x) {
        if (x < 0 || x > top) continue;
        const tardkd::cuda::Split split = divider.split(int32_t(x));
        CHECK(split.quotient == x / d && split.remainder == x % d);
        if (x * d > top) continue;
        const tardkd::cuda::Split small = in_block.split(int32_t(x));
        CHECK(small.quotient == x / d && small.remainder == x % d);
      }
  }
}

// ---- devices --------------------------------------------------------------------------------------------------------

static void test_device_guard() {
  using tardkd::cuda::DeviceGuard;
  cuda_on_cpu::Devices& devices = cuda_on_cpu::devices;
  const cuda_on_cpu::Devices before = devices;
  devices = {};
  devices.count = 3;

  // The caller's device comes back where it has been used, and is left alone where it has not.
  CHECK(cudaSetDevice(1) == cudaSuccess);
  {
    const DeviceGuard guard(2);
    CHECK(guard.error() == cudaSuccess && devices.current == 2);
  }
  CHECK(devices.current == 1);
  devices.current = 0;
  {
    const DeviceGuard guard(2);
  }
  CHECK(!devices.has_context[0]);
  {
    const DeviceGuard guard(devices.current);  // nothing to do
  }
  CHECK(!devices.has_context[0]);

  // A device that does not exist: the guard says so, and nobody hears of it later.
  CHECK(cudaSetDevice(1) == cudaSuccess);
  {
    const DeviceGuard guard(3);
    CHECK(guard.error() == cudaErrorInvalidDevice && cudaGetLastError() == cudaSuccess);
  }
  CHECK(devices.current == 1);
  devices = before;
}

__global__ void empty_kernel() {}

static void test_launches_on() {
  const auto status = [](int32_t device, int64_t blocks) {
    return tardkd::cuda::launch_on({device, nullptr}, "empty", empty_kernel, blocks, 0);
  };
  CHECK(status(0, 2).error == cudaSuccess && status(0, 0).error == cudaSuccess);
  CHECK(status(1, 2).error == cudaErrorInvalidDevice && std::string(status(1, 2).kernel) == "empty");
  CHECK(status(0, int64_t(1) << 32).error == cudaErrorInvalidConfiguration);  // not a grid of no block
}

struct Sums {
  int i;
  unsigned u;
  unsigned long long l;
  float f;
  double d;
};

__global__ void add_kernel(Sums* sums) {
  atomicAdd(&sums->i, -1);
  atomicAdd(&sums->u, 2u);
  atomicAdd(&sums->l, 1ull << 33);
  atomicAdd(&sums->f, 0.5f);
  atomicAdd(&sums->d, 0.25);
}

__global__ void sum_kernel(const float* values, double* partial, int32_t* done, double* sum) {
  SharedArena arena;
  const Shared<double> scratch = arena.take<double>(blockDim.x / kWarp);
  const Shared<int32_t> flag = arena.take<int32_t>(1);
  const double own = tardkd::cuda::block_sum(double(values[blockIdx.x * blockDim.x + threadIdx.x]), scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = own;
  if (tardkd::cuda::last_block(done, int32_t(gridDim.x), flag) && threadIdx.x == 0)
    for (unsigned b = 0; b < gridDim.x; ++b) *sum += partial[b];
}

static void test_atomics() {
  cuda_on_cpu::set_workers(4);
  Sums sums{};
  CHECK(launch(add_kernel, dim3(200), 128, 0, nullptr, &sums) == cudaSuccess);
  const int n = 200 * 128;
  CHECK(sums.i == -n && sums.u == 2u * n && sums.l == (1ull << 33) * n && sums.f == 0.5f * n && sums.d == 0.25 * n);

  std::vector<float> values(100 * 64);
  for (size_t i = 0; i < values.size(); ++i) values[i] = float(i % 17);
  double expected = 0, sum = 0;
  for (float value : values) expected += value;
  std::vector<double> partial(100);
  int32_t done = 0;
  const size_t shared = shared_bytes<double>(2) + shared_bytes<int32_t>(1);
  CHECK(launch(sum_kernel, dim3(100), 64, shared, nullptr, values.data(), partial.data(), &done, &sum) == cudaSuccess);
  CHECK(sum == expected && done == 0);
  cuda_on_cpu::set_workers(1);
}

// ---- kernels that are wrong -----------------------------------------------------------------------------------------

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void early_return_kernel() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void lane_returned_kernel(int* out) {
  if (threadIdx.x == 7) return;
  *out = __shfl_sync(kAllLanes, 1, 0);
}

__global__ void lane_at_barrier_kernel() {
  if (threadIdx.x != 7) __syncwarp();
  __syncthreads();
}

__global__ void divergent_shuffle_kernel(int* out) {
  if (threadIdx.x % 2)
    *out = __shfl_sync(kAllLanes, 1, 0);
  else
    *out = __shfl_sync(kAllLanes, 2, 0);
}

__global__ void masks_differ_kernel(int* out) { *out = __any_sync(threadIdx.x < 16 ? kAllLanes : 0xffff0001u, 1); }
__global__ void not_in_mask_kernel(int* out) { *out = __any_sync(0xfffeu, 1); }
__global__ void source_not_in_mask_kernel(int* out) {
  if (threadIdx.x < 4) *out = __shfl_sync(0xfu, 1, 4);
}
__global__ void full_mask_kernel() { __syncwarp(); }

__global__ void index_kernel(int index) {
  SharedArena arena;
  const Shared<int> shared = arena.take<int>(32);
  __syncthreads();
  if (threadIdx.x == 3 && blockIdx.x == 1) shared[index] = 1;
}
__global__ void four_kernel(int index) {
  SharedArena arena;
  arena.take<float>(32).four(index)[0] = 1;
}
__global__ void arena_kernel() {
  SharedArena arena;
  arena.take<float>(33);
}

// Throws from one worker of several, with the fibers of all blocks left where they are.
static void test_errors() {
  int out = 0;
  for (int workers : {1, 3}) {
    cuda_on_cpu::set_workers(workers);
    for (int round = 0; round < 3; ++round) {
      std::string error = error_of([] { launch(divergent_barrier_kernel, dim3(4), 64, 0, nullptr); });
      CHECK(says(error, {"kernel()", "block (", "thread (", "is at __syncthreads at ", "waits in __syncthreads at ",
                         "test_cuda_on_cpu.cpp:"}));
      const size_t first = error.find(".cpp:"), second = error.rfind(".cpp:");
      CHECK(std::abs(std::stoi(error.substr(first + 5)) - std::stoi(error.substr(second + 5))) == 2);

      error = error_of([] { launch(early_return_kernel, dim3(4), 64, 0, nullptr); });
      CHECK(says(error, {"return", "__syncthreads at "}));
      error = error_of([&] { launch(lane_returned_kernel, dim3(4), 64, 0, nullptr, &out); });
      CHECK(says(error, {"kernel(int*)", "waits in __shfl_sync at ", "thread (7, 0, 0) has returned"}));
      error = error_of([] { launch(lane_at_barrier_kernel, dim3(4), 64, 0, nullptr); });
      CHECK(says(error, {"waits in __syncwarp at ", "thread (7, 0, 0) waits in __syncthreads at "}));
      error = error_of([&] { launch(divergent_shuffle_kernel, dim3(4), 64, 0, nullptr, &out); });
      CHECK(says(error, {"waits in __shfl_sync at ", "but thread (", "with the lanes 0xffffffff"}));
      error = error_of([&] { launch(masks_differ_kernel, dim3(4), 32, 0, nullptr, &out); });
      CHECK(says(error, {"with the lanes 0xffffffff", "0xffff0001"}));
      error = error_of([&] { launch(not_in_mask_kernel, dim3(4), 32, 0, nullptr, &out); });
      CHECK(says(error, {"is not in the mask 0x0000fffe"}));
      error = error_of([&] { launch(source_not_in_mask_kernel, dim3(4), 32, 0, nullptr, &out); });
      CHECK(says(error, {"reads lane 4", "0x0000000f"}));
      error = error_of([] { launch(full_mask_kernel, dim3(4), 48, 0, nullptr); });
      CHECK(says(error, {"no thread 48"}));

      for (int index : {-1, 32}) {
        error = error_of([&] { launch(index_kernel, dim3(4), 32, 128, nullptr, index); });
        CHECK(says(error, {"kernel(int)", "block (1, 0, 0)", "thread (3, 0, 0)", "of a shared array of 32",
                           "after __syncthreads at "}));
        CHECK(says(error, {("index " + std::to_string(index)).c_str()}));
      }
      for (int index : {-4, 30, 32}) {
        error = error_of([&] { launch(four_kernel, dim3(1), 32, 128, nullptr, index); });
        CHECK(says(error, {"4 elements from index ", "of a shared array of 32"}));
      }
      error = error_of([] { launch(arena_kernel, dim3(1), 32, 128, nullptr); });
      CHECK(says(error, {"takes 144 bytes of shared memory, but the launch gave 128"}));

      CHECK(error_of([&] { launch(index_kernel, dim3(4), 32, 128, nullptr, 31); }).empty());
    }
    test_barriers();
  }
  cuda_on_cpu::set_workers(1);
}

// Without the second barrier of reverse_kernel a fast thread overwrites what a slow one has yet to read.
// Sums of the block in turn, without the barrier that keeps a fast warp from overwriting what a slow one still reads.
__global__ void hasty_sums_kernel(int* sums) {
  SharedArena arena;
  const Shared<int> scratch = arena.take<int>(kThreads / kWarp);
  for (int round = 0; round < 4; ++round) {
    const int of_warp = tardkd::cuda::warp_sum(round + 1);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = of_warp;
    __syncthreads();
    int sum = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += scratch[warp];
    sums[round * kThreads + threadIdx.x] = sum;
  }
}

__global__ void missing_barrier_kernel(int* data) {
  SharedArena arena;
  const Shared<int> shared = arena.take<int>(blockDim.x);
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
  }
}

__global__ void unwritten_kernel(float* out) {
  SharedArena arena;
  *out = arena.take<float>(1)[0];
}

static void test_hidden_mistakes() {
  int wrong = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    cuda_on_cpu::set_seed(seed);
    std::vector<int> data(64);
    for (int t = 0; t < 64; ++t) data[t] = t;
    launch(missing_barrier_kernel, dim3(1), 64, shared_bytes<int>(64), nullptr, data.data());
    for (int t = 0; t < 64; ++t)
      if (data[t] != t) {
        ++wrong;
        break;
      }
  }
  CHECK(wrong >= 8);

  int hasty = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    cuda_on_cpu::set_seed(seed);
    std::vector<int> sums(4 * kThreads);
    launch(hasty_sums_kernel, dim3(1), kThreads, shared_bytes<int>(kThreads / kWarp), nullptr, sums.data());
    bool right = true;
    for (int at = 0; at < 4 * kThreads; ++at) right = right && sums[at] == (at / kThreads + 1) * kThreads;
    hasty += !right;
  }
  CHECK(hasty >= 8);
  float value = 0;
  launch(unwritten_kernel, dim3(1), 1, shared_bytes<float>(1), nullptr, &value);
  CHECK(std::isnan(value));
}

__global__ void order_kernel(std::vector<int>* order) { order->push_back(int(blockIdx.x * blockDim.x + threadIdx.x)); }

static void test_order() {
  std::set<std::vector<int>> orders;
  std::vector<int> again;
  for (uint64_t seed : {1, 1, 2}) {
    cuda_on_cpu::set_seed(seed);
    for (int repeat = 0; repeat < 2; ++repeat) {
      std::vector<int> order;
      launch(order_kernel, dim3(4), 32, 0, nullptr, &order);
      orders.insert(order);
    }
  }
  CHECK(orders.size() == 4);  // a seed repeats itself, its launches do not
}

__global__ void nothing_kernel() {}

static void test_limits() {
  const auto error = [](dim3 grid, int threads, size_t shared) {
    return launch(nothing_kernel, grid, threads, shared, nullptr);
  };
  CHECK(error(dim3(1), 1024, 227 * 1024) == cudaSuccess);
  CHECK(error(dim3(1), 1025, 0) == cudaErrorInvalidConfiguration);
  CHECK(error(dim3(1), 0, 0) == cudaErrorInvalidConfiguration);
  CHECK(error(dim3(1), 32, 227 * 1024 + 1) == cudaErrorInvalidConfiguration);
  CHECK(error(dim3(1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(error(dim3(1, 1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(error(dim3(0x80000000u), 1, 0) == cudaErrorInvalidConfiguration);
}

static void test_launches() {
  cuda_on_cpu::reset();
  launch(nothing_kernel, dim3(1), 1, 0, nullptr);
  launch(nothing_kernel, dim3(0), 1, 0, nullptr);  // no launch
  float value = 0;
  launch(unwritten_kernel, dim3(1), 1, shared_bytes<float>(1), nullptr, &value);
  CHECK((cuda_on_cpu::launches() == std::vector<std::string>{"kernel()", "kernel(float*)"}));
}

__global__ void busy_kernel(float* out) {
  SharedArena arena;
  const Shared<float> shared = arena.take<float>(blockDim.x);
  float value = float(threadIdx.x);
  for (int k = 0; k < 11; ++k) {
    shared[(threadIdx.x + k) % blockDim.x] = value;
    __syncthreads();
    value += shared[threadIdx.x];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

static void test_speed() {
  std::vector<float> out(2000);
  const auto start = std::chrono::steady_clock::now();
  launch(busy_kernel, dim3(2000), 256, shared_bytes<float>(256), nullptr, out.data());
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("2000 blocks of 256 threads with 11 barriers: %.3f s, %.0f ns a thread and barrier\n", seconds,
              seconds / (2000 * 256 * 11) * 1e9);
}

// For AddressSanitizer to find: the last thread, woken up after a barrier, writes behind the end.
__global__ void overrun_kernel(float* out) {
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x + 1] = 1;
}

static int overrun() {
  std::vector<float> out(2 * 64);
  launch(overrun_kernel, dim3(2), 64, 0, nullptr, out.data());
  return 0;
}

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "overrun") return overrun();
  test_barriers();
  test_places();
  test_shuffle<int>();
  test_shuffle<unsigned>();
  test_shuffle<int64_t>();
  test_shuffle<float>();
  test_shuffle<double>();
  test_votes();
  test_ranks();
  test_dividers();
  test_device_guard();
  test_launches_on();
  test_atomics();
  test_errors();
  test_hidden_mistakes();
  test_order();
  test_limits();
  test_launches();
  test_speed();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
