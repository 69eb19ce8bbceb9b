#include "runtime.h"

#include <utility>

#include "launch.h"
#include "translation.h"

namespace ptx_on_cpu {
namespace {

enum Error { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidDevice = 101 };

constexpr uint64_t kMostThreads = 1024, kMostShared = 227 * 1024;
constexpr uint64_t kMostShadowed = uint64_t(1) << 22;  // elements of a tensor that are watched for races

struct Runtime {
  std::vector<std::string> compiled;           // PTX of all architectures
  std::map<const void*, std::string> names;    // of kernels, by the host's functions that launch them
  std::map<int, std::vector<Module>> modules;  // parsed, by architecture
  std::vector<Module> replacements;
  std::map<std::pair<int, std::string>, std::unique_ptr<Kernel>> kernels;
  Ranges ranges;
  std::vector<Cache> caches;
  std::vector<std::string> launches;
  int architecture = 90, last_error = kSuccess;
  uint64_t seed = 0, stamps = 0;
};

Runtime& runtime() {
  static Runtime runtime;
  return runtime;
}

std::vector<Module>& modules() {
  Runtime& now = runtime();
  std::vector<Module>& parsed = now.modules[now.architecture];
  if (parsed.empty())
    for (const std::string& ptx : texts()) parsed.push_back(parse(ptx));
  return parsed;
}

Kernel& kernel_of(const std::string& name) {
  Runtime& now = runtime();
  std::unique_ptr<Kernel>& kernel = now.kernels[{now.architecture, name}];
  if (kernel) return *kernel;
  for (const std::vector<Module>* parsed : {&now.replacements, &modules()}) {
    for (const Module& module : *parsed) {
      const auto entry = module.functions.find(name);
      if (entry == module.functions.end()) continue;
      kernel = translate(module, entry->second);
      return *kernel;
    }
  }
  fail("no kernel " + name + " was compiled for sm_" + std::to_string(now.architecture));
}

int launch(Kernel& kernel, const Dim& grid, const Dim& block, size_t shared_bytes, const std::vector<uint8_t>& params) {
  Runtime& now = runtime();
  if (block.count() == 0 || block.count() > kMostThreads || grid.count() == 0 || grid.y > 65535 || grid.z > 65535)
    return kInvalidConfiguration;
  if (shared_bytes > kMostShared) return kInvalidValue;
  now.launches.push_back(kernel.name);
  ++kernel.launches;
  kernel.blocks += grid.count();
  kernel.threads += grid.count() * block.count();
  kernel.shared_bytes = std::max<uint64_t>(kernel.shared_bytes, shared_bytes);

  Launch launch(kernel, now.ranges, now.stamps);
  launch.launch_stamp = ++now.stamps;
  launch.params = params;
  if (!now.caches.empty()) launch.traces.resize(grid.count());
  try {
    run(launch, grid, block, shared_bytes, now.seed ? now.seed * 7919 + now.launches.size() : 0);
  } catch (const Blamed&) {
  }
  for (Cache& cache : now.caches) cache.run(launch.traces);
  if (launch.findings.empty()) return kSuccess;
  std::string all = kernel.name + " breaks rules:";
  for (const auto& [finding, count] : launch.findings) all += "\n  " + std::to_string(count) + " times " + finding;
  fail(all);
}

// The PTX in what nvcc puts into an object file, which has a header and entries with headers of their own.
void add_compiled(const char* container) {
  const auto number = [&](size_t at, auto example) {
    return std::memcpy(&example, container + at, sizeof example), example;
  };
  constexpr uint32_t kMagic = 0xba55ed50;
  if (number(0, uint32_t()) != kMagic) fail("nvcc writes its code in a form that is not understood");
  size_t at = number(6, uint16_t());
  for (const size_t end = at + number(8, uint64_t()); at < end;
       at += number(at + 4, uint32_t()) + number(at + 8, uint64_t())) {
    constexpr uint16_t kText = 1;
    if (number(at, uint16_t()) != kText) continue;
    const std::string ptx = container + at + number(at + 4, uint32_t());
    if (ptx.find(".version") == std::string::npos) fail("the PTX is compressed: nvcc wants --no-compress");
    runtime().compiled.push_back(ptx);
  }
}

}  // namespace

void set_architecture(int architecture) { runtime().architecture = architecture; }
void set_seed(uint64_t seed) { runtime().seed = seed; }

void allow(uint64_t address, uint64_t bytes, uint64_t item) {
  if (!bytes) return;
  Range range{address, address + bytes, item, {}};
  for (auto other = runtime().ranges.begin(); other != runtime().ranges.end();) {  // those that overlap become one
    const bool overlaps = other->second.begin < range.end && range.begin < other->second.end;
    if (overlaps) {
      range.begin = std::min(range.begin, other->second.begin);
      range.end = std::max(range.end, other->second.end);
      range.item = std::min(range.item, other->second.item);
    }
    other = overlaps ? runtime().ranges.erase(other) : std::next(other);
  }
  const uint64_t items = (range.end - range.begin + range.item - 1) / range.item;
  if (items <= kMostShadowed) range.shadow.resize(items);
  const uint64_t begin = range.begin;
  runtime().ranges[begin] = std::move(range);
}
void forbid_all() { runtime().ranges.clear(); }

std::vector<std::string> launches() { return runtime().launches; }
void reset() {
  runtime().launches.clear();
  runtime().seed = 0;
}

std::vector<std::string> texts() {
  const std::string target = ".target sm_" + std::to_string(runtime().architecture) + "\n";
  std::vector<std::string> found;
  for (const std::string& ptx : runtime().compiled)
    if (ptx.find(target) != std::string::npos) found.push_back(ptx);
  return found;
}

void replace(const std::string& ptx) {
  runtime().replacements = {parse(ptx)};
  runtime().kernels.clear();
}
void restore() {
  runtime().replacements.clear();
  runtime().kernels.clear();
}

void launch(const std::string& name, unsigned blocks, unsigned threads, uint64_t shared_bytes,
            const std::string& params) {
  launch(kernel_of(name), {blocks, 1, 1}, {threads, 1, 1}, shared_bytes, {params.begin(), params.end()});
}

std::vector<const Kernel*> kernels() {
  std::vector<const Kernel*> launched;
  for (const auto& [key, kernel] : runtime().kernels)
    if (kernel && kernel->launches) launched.push_back(kernel.get());
  return launched;
}
void add_cache(uint64_t bytes, uint64_t resident) { runtime().caches.emplace_back(bytes, resident); }
std::vector<std::pair<uint64_t, uint64_t>> traffic() {
  std::vector<std::pair<uint64_t, uint64_t>> all;
  for (Cache& cache : runtime().caches) {
    cache.flush();
    all.emplace_back(cache.read, cache.written);
  }
  runtime().caches.clear();
  return all;
}
void reset_counts() {
  for (auto& [key, kernel] : runtime().kernels) {
    if (!kernel) continue;
    for (const Instruction& i : kernel->code) i.count = Count{};
    kernel->launches = kernel->blocks = kernel->threads = kernel->barriers = kernel->shared_bytes = 0;
  }
}

// ---- what compiled host code calls ---------------------------------------------------------------------------------

namespace {
struct Configuration {
  Dim grid, block;
  size_t shared_bytes;
  void* stream;
};
std::vector<Configuration> configurations;  // of launches that are being made

int set_last(int error) { return runtime().last_error = error; }
}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct {
    int32_t magic, version;
    const char* container;
  } given;
  std::memcpy(&given, wrapper, sizeof given);
  add_compiled(given.container);
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  runtime().names[host] = name;
}

int __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared_bytes, void* stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return kSuccess;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared_bytes, void** stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *stream = last.stream;
  return kSuccess;
}
int cudaLaunchKernel(const void* host, Dim grid, Dim block, void** arguments, size_t shared_bytes, void*) {
  Kernel& kernel = kernel_of(runtime().names.at(host));
  std::vector<uint8_t> params(kernel.param_bytes);
  for (size_t k = 0; k < kernel.parameters.size(); ++k)
    std::memcpy(&params[kernel.parameter_offsets[k]], arguments[k], kernel.parameters[k].bytes);
  return set_last(launch(kernel, grid, block, shared_bytes, params));
}
int __cudaGetKernel(const void** kernel, const void* host) { return *kernel = host, kSuccess; }
int __cudaLaunchKernel(const void* host, Dim grid, Dim block, void** arguments, size_t shared_bytes, void* stream) {
  return cudaLaunchKernel(host, grid, block, arguments, shared_bytes, stream);
}

// There is one device.
int cudaGetLastError() { return std::exchange(runtime().last_error, kSuccess); }
int cudaGetDevice(int* device) { return *device = 0, kSuccess; }
int cudaSetDevice(int device) { return device == 0 ? kSuccess : set_last(kInvalidDevice); }
int cudaGetDeviceCount(int* count) { return *count = 1, kSuccess; }
int cudaRuntimeGetVersion(int* version) { return *version = 0, kSuccess; }
int cudaFuncSetAttribute(const void*, int, int bytes) {
  return bytes > int(kMostShared) ? set_last(kInvalidValue) : kSuccess;
}
int cudaFuncGetAttributes(void*, const void*) { return kSuccess; }
int cudaGetDriverEntryPoint(const char*, void** function, uint64_t, int*) { return *function = nullptr, kSuccess; }
int cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, uint64_t, int*) {
  return *function = nullptr, kSuccess;
}
const char* cudaGetErrorString(int error) {
  switch (error) {
    case kSuccess:
      return "no error";
    case kInvalidValue:
      return "invalid argument";
    case kInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "invalid device ordinal";
  }
}

}  // extern "C"

}  // namespace ptx_on_cpu
