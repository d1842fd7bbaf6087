// A simulated libcuda.so.1. Device memory is host memory, and queued work runs only when it is waited for. It
// is stricter than a real driver: the stream fails on memory that was not allocated or is freed, on calls
// without a current context, and on work that must not be captured.
#include "fake_cuda.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace {

enum Error {
  success = 0,
  invalid_value = 1,
  out_of_memory = 2,
  not_initialized = 3,
  deinitialized = 4,
  no_device = 100,
  invalid_context = 201,
  illegal_address = 700,
  capture_unsupported = 900,
  capture_invalidated = 901
};

struct Operation {
  std::string name;
  std::function<void()> work;
};

struct Fake {
  fake_cuda::Settings settings;
  fake_cuda::Counts counts;
  std::map<std::uintptr_t, std::size_t> memory;
  std::set<void*> pinned;
  std::vector<std::string> done;
  std::string broken;
  int left_out = -1;
  bool started = false;
};

std::recursive_mutex mutex;
Fake fake;
thread_local std::vector<void*> contexts;
char the_context;

bool inside(const void* address, std::size_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  auto found = fake.memory.upper_bound(first);
  return found != fake.memory.begin() && (--found, first + bytes <= found->first + found->second);
}

void break_with(const std::string& reason) {
  if (fake.broken.empty()) fake.broken = reason;
}

}  // namespace

struct CUgraph_st {
  std::vector<Operation> operations;
};
struct CUgraphExec_st {
  std::vector<Operation> operations;
};
struct CUstream_st {
  std::vector<Operation> queue, captured;
  bool capturing = false, invalidated = false;
};

namespace {

std::set<CUstream_st*> streams;

void work_off(CUstream_st& stream) {
  std::vector<Operation> queue;
  queue.swap(stream.queue);
  for (const Operation& operation : queue) {
    if (!fake.broken.empty()) return;
    fake.done.push_back(operation.name);
    operation.work();
  }
}

int queue(CUstream_st* stream, const char* name, std::function<void()> work) {
  if (contexts.empty()) return invalid_context;
  if (streams.count(stream) == 0) return invalid_value;
  (stream->capturing ? stream->captured : stream->queue).push_back({name, std::move(work)});
  return success;
}

// Calls that invalidate a capture by the same thread.
bool unsafe() {
  for (CUstream_st* stream : streams) {
    if (stream->capturing) return stream->invalidated = true;
  }
  return false;
}

void copy(void* target, const void* source, std::size_t bytes, bool target_on_device, bool source_on_device) {
  if (target_on_device && !inside(target, bytes))
    return break_with("a copy to memory that is not the device's");
  if (source_on_device && !inside(source, bytes))
    return break_with("a copy from memory that is not the device's");
  std::memcpy(target, source, bytes);
}

void* pointer(std::uint64_t address) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)); }

using Lock = std::lock_guard<std::recursive_mutex>;

}  // namespace

namespace fake_cuda {

void reset() {
  const Lock lock(mutex);
  for (const auto& [address, bytes] : fake.memory) std::free(reinterpret_cast<void*>(address));
  for (void* address : fake.pinned) std::free(address);
  for (CUstream_st* stream : streams) delete stream;
  streams.clear();
  fake = Fake{};
}
Settings& settings() { return fake.settings; }
Counts counts() {
  const Lock lock(mutex);
  return fake.counts;
}
std::vector<std::string> done() {
  const Lock lock(mutex);
  return std::exchange(fake.done, {});
}
void leave_out(int operation) { fake.left_out = operation; }
std::string broken() { return fake.broken; }
bool is_memory(const void* address, std::size_t bytes) { return inside(address, bytes); }
bool capturing(CUstream_st* stream) { return stream->capturing; }
bool has_context() { return !contexts.empty(); }
void enqueue(CUstream_st* stream, const std::string& name, std::function<void()> work) {
  const Lock lock(mutex);
  if (queue(stream, name.c_str(), std::move(work)) != success)
    break_with("work without a stream or a context");
}
void break_stream(const std::string& reason) { break_with(reason); }

void* take_memory(std::size_t bytes) {
  if (fake.counts.used + bytes > fake.settings.total) return nullptr;
  void* address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(address, 0xff, bytes);  // NaN in every float
  fake.memory[reinterpret_cast<std::uintptr_t>(address)] = bytes;
  fake.counts.used += bytes;
  return address;
}

void give_memory(void* address) {
  for (CUstream_st* stream : streams) work_off(*stream);  // as a real driver
  const auto found = fake.memory.find(reinterpret_cast<std::uintptr_t>(address));
  if (found == fake.memory.end()) return break_with("memory is freed that is not the device's");
  fake.counts.used -= found->second;
  fake.memory.erase(found);
  std::free(address);
}

}  // namespace fake_cuda

#define CUDA extern "C" __attribute__((visibility("default"))) int

CUDA cuInit(unsigned) {
  const Lock lock(mutex);
  fake.started = true;
  return fake.settings.devices == 0 ? no_device : success;
}
CUDA cuDeviceGet(int* device, int ordinal) {
  if (!fake.started) return not_initialized;
  *device = 40 + ordinal;
  return ordinal < fake.settings.devices ? success : invalid_value;
}
CUDA cuDeviceGetName(char* name, int length, int device) {
  std::snprintf(name, static_cast<std::size_t>(length), "Simulated %d", device - 40);
  return success;
}
CUDA cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? fake.settings.major : fake.settings.minor;
  return attribute == 75 || attribute == 76 ? success : invalid_value;
}
CUDA cuDevicePrimaryCtxRetain(void** context, int) {
  const Lock lock(mutex);
  ++fake.counts.contexts;
  *context = &the_context;
  return success;
}
CUDA cuDevicePrimaryCtxRelease_v2(int) {
  const Lock lock(mutex);
  --fake.counts.contexts;
  return success;
}
CUDA cuCtxPushCurrent_v2(void* context) {
  if (fake.settings.ended) return deinitialized;
  contexts.push_back(context);
  return success;
}
CUDA cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return invalid_context;
  *context = contexts.back();
  contexts.pop_back();
  return success;
}
CUDA cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  *total = fake.settings.total;
  *free = *total - fake.counts.used;
  return success;
}
CUDA cuMemAlloc_v2(std::uint64_t* address, std::size_t bytes) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (unsafe()) return capture_unsupported;
  ++fake.counts.allocations;
  void* taken = fake_cuda::take_memory(bytes);
  *address = reinterpret_cast<std::uintptr_t>(taken);
  return taken == nullptr ? out_of_memory : success;
}
CUDA cuMemFree_v2(std::uint64_t address) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (unsafe()) return capture_unsupported;
  fake_cuda::give_memory(pointer(address));
  return success;
}
CUDA cuMemHostAlloc(void** address, std::size_t bytes, unsigned) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (unsafe()) return capture_unsupported;
  ++fake.counts.allocations, ++fake.counts.pinned;
  *address = std::malloc(bytes);
  std::memset(*address, 0xff, bytes);
  fake.pinned.insert(*address);
  return success;
}
CUDA cuMemFreeHost(void* address) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (fake.pinned.erase(address) == 0) return invalid_value;
  for (CUstream_st* stream : streams) work_off(*stream);
  --fake.counts.pinned;
  std::free(address);
  return success;
}
CUDA cuMemsetD8Async(std::uint64_t address, unsigned char value, std::size_t count, CUstream_st* stream) {
  const Lock lock(mutex);
  return queue(stream, "clear", [=] {
    if (!inside(pointer(address), count)) return break_with("memory is cleared that is not the device's");
    std::memset(pointer(address), value, count);
  });
}
CUDA cuMemcpyHtoDAsync_v2(std::uint64_t target, const void* source, std::size_t bytes, CUstream_st* stream) {
  const Lock lock(mutex);
  return queue(stream, "upload", [=] { copy(pointer(target), source, bytes, true, false); });
}
CUDA cuMemcpyDtoHAsync_v2(void* target, std::uint64_t source, std::size_t bytes, CUstream_st* stream) {
  const Lock lock(mutex);
  return queue(stream, "download", [=] { copy(target, pointer(source), bytes, false, true); });
}

struct CUDA_MEMCPY2D {  // as in cuda.h
  std::size_t source_x, source_y;
  unsigned source_type;
  const void* source_host;
  std::uint64_t source;
  void* source_array;
  std::size_t source_pitch, target_x, target_y;
  unsigned target_type;
  void* target_host;
  std::uint64_t target;
  void* target_array;
  std::size_t target_pitch, width, height;
};
CUDA cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* given, CUstream_st* stream) {
  const Lock lock(mutex);
  const CUDA_MEMCPY2D rows = *given;
  const bool whole = rows.source_x == 0 && rows.source_y == 0 && rows.target_x == 0 && rows.target_y == 0;
  if (!whole || rows.source_type != 2 || rows.target_type != 2) return invalid_value;
  if (rows.width > rows.source_pitch || rows.width > rows.target_pitch) return invalid_value;
  return queue(stream, "copy_rows", [=] {
    for (std::size_t row = 0; row < rows.height; ++row)
      copy(pointer(rows.target + row * rows.target_pitch), pointer(rows.source + row * rows.source_pitch),
           rows.width, true, true);
  });
}
CUDA cuStreamCreate(CUstream_st** stream, unsigned flags) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (flags != 1) return invalid_value;
  ++fake.counts.streams;
  *stream = new CUstream_st;
  streams.insert(*stream);
  return success;
}
CUDA cuStreamDestroy_v2(CUstream_st* stream) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (streams.erase(stream) == 0) return invalid_value;
  --fake.counts.streams;
  delete stream;
  return success;
}
CUDA cuStreamSynchronize(CUstream_st* stream) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (stream->capturing) {
    stream->invalidated = true;
    return capture_unsupported;
  }
  work_off(*stream);
  return fake.broken.empty() ? success : illegal_address;
}
CUDA cuStreamBeginCapture_v2(CUstream_st* stream, int mode) {
  const Lock lock(mutex);
  if (contexts.empty()) return invalid_context;
  if (stream->capturing || mode != 1) return invalid_value;
  stream->capturing = true;
  return success;
}
CUDA cuStreamEndCapture(CUstream_st* stream, CUgraph_st** graph) {
  const Lock lock(mutex);
  if (!stream->capturing) return invalid_value;
  stream->capturing = false;
  std::vector<Operation> captured;
  captured.swap(stream->captured);
  *graph = nullptr;
  if (std::exchange(stream->invalidated, false) || !fake.settings.capturable) return capture_invalidated;
  ++fake.counts.graphs;
  *graph = new CUgraph_st{std::move(captured)};
  return success;
}
CUDA cuGraphInstantiateWithFlags(CUgraphExec_st** executable, CUgraph_st* graph, unsigned long long flags) {
  const Lock lock(mutex);
  if (flags != 0) return invalid_value;
  ++fake.counts.graphs;
  *executable = new CUgraphExec_st{graph->operations};
  return success;
}
CUDA cuGraphLaunch(CUgraphExec_st* executable, CUstream_st* stream) {
  const Lock lock(mutex);
  const int launched = queue(stream, "launch", [] {});
  for (std::size_t index = 0; launched == success && index < executable->operations.size(); ++index) {
    if (static_cast<int>(index) != fake.left_out) stream->queue.push_back(executable->operations[index]);
  }
  return launched;
}
CUDA cuGraphExecDestroy(CUgraphExec_st* executable) {
  const Lock lock(mutex);
  --fake.counts.graphs;
  delete executable;
  return success;
}
CUDA cuGraphDestroy(CUgraph_st* graph) {
  const Lock lock(mutex);
  --fake.counts.graphs;
  delete graph;
  return success;
}
CUDA cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names{
      {success, "CUDA_SUCCESS"},
      {invalid_value, "CUDA_ERROR_INVALID_VALUE"},
      {out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {not_initialized, "CUDA_ERROR_NOT_INITIALIZED"},
      {no_device, "CUDA_ERROR_NO_DEVICE"},
      {invalid_context, "CUDA_ERROR_INVALID_CONTEXT"},
      {illegal_address, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {capture_unsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
      {capture_invalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}};
  const auto found = names.find(error);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? invalid_value : success;
}
CUDA cuGetErrorString(int error, const char** text) {
  *text = error == illegal_address ? fake.broken.c_str() : "as simulated";
  return success;
}
