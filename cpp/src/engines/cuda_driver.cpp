// Hand-written declarations of libcuda's functions, and CudaDevice on top of them. Constants are those of the
// public cuda.h; they are part of CUDA's stable ABI.
#include "engines/cuda_driver.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "bundle/error.hpp"

struct CUgraph_st;

namespace kvexport::detail {

namespace {

using Address = std::uint64_t;  // CUdeviceptr
constexpr int success = 0, out_of_memory = 2, no_device = 100;
constexpr int capability_major = 75, capability_minor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr unsigned stream_non_blocking = 1;
constexpr int capture_thread_local = 1;  // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
constexpr int on_device = 2;             // CU_MEMORYTYPE_DEVICE

struct Copy2D {  // CUDA_MEMCPY2D
  std::size_t source_x = 0, source_y = 0;
  int source_type = on_device;
  const void* source_host = nullptr;
  Address source = 0;
  void* source_array = nullptr;
  std::size_t source_pitch = 0;
  std::size_t target_x = 0, target_y = 0;
  int target_type = on_device;
  void* target_host = nullptr;
  Address target = 0;
  void* target_array = nullptr;
  std::size_t target_pitch = 0;
  std::size_t width = 0, height = 0;
};

Address number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

constexpr const char* other_device = "use provider \"cpu\", or a machine with an NVIDIA GPU";

}  // namespace

struct CudaDriver {
  explicit CudaDriver(const char* library) {
    // Never unloaded: threads of the driver may outlive the last call.
    handle = dlopen(library, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) {
      const char* reason = dlerror();
      throw Failure(Code::cannot_run_here, "there is no NVIDIA driver on this machine",
                    reason == nullptr ? library : reason, "", other_device);
    }
    try {
      find(init, "cuInit");
      find(device_get, "cuDeviceGet");
      find(device_name, "cuDeviceGetName");
      find(device_attribute, "cuDeviceGetAttribute");
      find(context_retain, "cuDevicePrimaryCtxRetain");
      find(context_release, "cuDevicePrimaryCtxRelease_v2");
      find(context_push, "cuCtxPushCurrent_v2");
      find(context_pop, "cuCtxPopCurrent_v2");
      find(memory_info, "cuMemGetInfo_v2");
      find(allocate, "cuMemAlloc_v2");
      find(release, "cuMemFree_v2");
      find(allocate_host, "cuMemHostAlloc");
      find(release_host, "cuMemFreeHost");
      find(set_bytes, "cuMemsetD8Async");
      find(to_device, "cuMemcpyHtoDAsync_v2");
      find(to_host, "cuMemcpyDtoHAsync_v2");
      find(copy_2d, "cuMemcpy2DAsync_v2");
      find(stream_create, "cuStreamCreate");
      find(stream_destroy, "cuStreamDestroy_v2");
      find(stream_synchronize, "cuStreamSynchronize");
      find(capture_begin, "cuStreamBeginCapture_v2");
      find(capture_end, "cuStreamEndCapture");
      find(graph_instantiate, "cuGraphInstantiateWithFlags");
      find(graph_launch, "cuGraphLaunch");
      find(graph_exec_destroy, "cuGraphExecDestroy");
      find(graph_destroy, "cuGraphDestroy");
      find(error_name, "cuGetErrorName");
      find(error_string, "cuGetErrorString");
    } catch (...) {
      dlclose(handle);
      throw;
    }
  }
  ~CudaDriver() { dlclose(handle); }
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;

  template <typename Function>
  void find(Function& function, const char* symbol) {
    function = reinterpret_cast<Function>(dlsym(handle, symbol));
    if (function == nullptr)
      throw Failure(Code::cannot_run_here, "the NVIDIA driver must support CUDA 11.4 or later",
                    std::string("it has no ") + symbol, "a driver for CUDA 11.4 or later",
                    "update the driver, or use provider \"cpu\"");
  }

  void* handle;
  int (*init)(unsigned flags);
  int (*device_get)(int* device, int ordinal);
  int (*device_name)(char* name, int length, int device);
  int (*device_attribute)(int* value, int attribute, int device);
  int (*context_retain)(CUctx_st** context, int device);
  int (*context_release)(int device);
  int (*context_push)(CUctx_st* context);
  int (*context_pop)(CUctx_st** context);
  int (*memory_info)(std::size_t* free, std::size_t* total);
  int (*allocate)(Address* address, std::size_t bytes);
  int (*release)(Address address);
  int (*allocate_host)(void** address, std::size_t bytes, unsigned flags);
  int (*release_host)(void* address);
  int (*set_bytes)(Address address, unsigned char value, std::size_t count, CUstream_st* stream);
  int (*to_device)(Address target, const void* source, std::size_t bytes, CUstream_st* stream);
  int (*to_host)(void* target, Address source, std::size_t bytes, CUstream_st* stream);
  int (*copy_2d)(const Copy2D* copy, CUstream_st* stream);
  int (*stream_create)(CUstream_st** stream, unsigned flags);
  int (*stream_destroy)(CUstream_st* stream);
  int (*stream_synchronize)(CUstream_st* stream);
  int (*capture_begin)(CUstream_st* stream, int mode);
  int (*capture_end)(CUstream_st* stream, CUgraph_st** graph);
  int (*graph_instantiate)(CUgraphExec_st** executable, CUgraph_st* graph, unsigned long long flags);
  int (*graph_launch)(CUgraphExec_st* executable, CUstream_st* stream);
  int (*graph_exec_destroy)(CUgraphExec_st* executable);
  int (*graph_destroy)(CUgraph_st* graph);
  int (*error_name)(int error, const char** name);
  int (*error_string)(int error, const char** text);
};

CudaDevice::CudaDevice(const char* library) : driver_(std::make_unique<CudaDriver>(library)) {
  int error = driver_->init(0);
  if (error == success) error = driver_->device_get(&device_, 0);
  if (error != success) {
    const std::string got = error == no_device ? "0 devices" : text_of(error);
    throw Failure(Code::cannot_run_here, "CUDA finds no GPU", got, "", other_device);
  }
  require(driver_->context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  try {
    open_device();
  } catch (...) {
    driver_->context_release(device_);
    throw;
  }
}

void CudaDevice::open_device() {
  ContextLock lock(*this);
  char name[256] = "";
  require(driver_->device_name(name, sizeof name - 1, device_), "cuDeviceGetName");
  int major = 0, minor = 0;
  require(driver_->device_attribute(&major, capability_major, device_), "cuDeviceGetAttribute");
  require(driver_->device_attribute(&minor, capability_minor, device_), "cuDeviceGetAttribute");
  name_ = name;
  compute_capability_ = std::to_string(major) + "." + std::to_string(minor);
  require(driver_->stream_create(&stream_, stream_non_blocking), "cuStreamCreate");
}

CudaDevice::~CudaDevice() {
  {
    ContextLock lock(*this);
    driver_->stream_destroy(stream_);
  }
  driver_->context_release(device_);
}

CudaDevice::ContextLock::ContextLock(CudaDevice& device) noexcept : device_(device), lock_(device.mutex_) {
  if (device_.lock_depth_++ == 0)
    device_.context_pushed_ = device_.driver_->context_push(device_.context_) == success;
}

CudaDevice::ContextLock::~ContextLock() {
  CUctx_st* popped = nullptr;
  if (--device_.lock_depth_ == 0 && device_.context_pushed_) device_.driver_->context_pop(&popped);
}

DeviceMemory CudaDevice::memory() {
  ContextLock lock(*this);
  DeviceMemory memory;
  memory.name = name_;
  require(driver_->memory_info(&memory.free, &memory.total), "cuMemGetInfo");
  return memory;
}

void* CudaDevice::allocate(std::size_t bytes) {
  ContextLock lock(*this);
  Address address = 0;
  const int error = driver_->allocate(&address, std::max<std::size_t>(bytes, 1));
  if (error == out_of_memory) {
    std::size_t free = 0, total = 0;
    driver_->memory_info(&free, &total);
    throw Failure(Code::cannot_run_here,
                  name_ + " must have " + std::to_string(bytes) + " bytes of free memory",
                  std::to_string(free) + " of " + std::to_string(total) + " bytes are free", "",
                  "close other programs that use the GPU, or use fewer or smaller caches");
  }
  require(error, "cuMemAlloc");
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}

void CudaDevice::release(void* address) noexcept {
  ContextLock lock(*this);
  driver_->release(number(address));
}

void* CudaDevice::allocate_pinned(std::size_t bytes) {
  ContextLock lock(*this);
  void* address = nullptr;
  require(driver_->allocate_host(&address, std::max<std::size_t>(bytes, 1), 0), "cuMemHostAlloc");
  return address;
}

void CudaDevice::release_pinned(void* address) noexcept {
  ContextLock lock(*this);
  driver_->release_host(address);
}

void CudaDevice::clear(void* address, std::size_t bytes) {
  if (bytes == 0) return;
  ContextLock lock(*this);
  require(driver_->set_bytes(number(address), 0, bytes, stream_), "cuMemsetD8Async");
}

void CudaDevice::upload(void* target, const void* host, std::size_t bytes) {
  if (bytes == 0) return;
  ContextLock lock(*this);
  require(driver_->to_device(number(target), host, bytes, stream_), "cuMemcpyHtoDAsync");
}

void CudaDevice::download(void* host, const void* source, std::size_t bytes) {
  if (bytes == 0) return;
  ContextLock lock(*this);
  require(driver_->to_host(host, number(source), bytes, stream_), "cuMemcpyDtoHAsync");
}

void CudaDevice::copy_rows(void* target, std::size_t target_pitch, const void* source,
                           std::size_t source_pitch, std::size_t width, std::size_t rows) {
  if (width == 0 || rows == 0) return;
  ContextLock lock(*this);
  Copy2D copy;
  copy.source = number(source), copy.source_pitch = source_pitch;
  copy.target = number(target), copy.target_pitch = target_pitch;
  copy.width = width, copy.height = rows;
  require(driver_->copy_2d(&copy, stream_), "cuMemcpy2DAsync");
}

void CudaDevice::synchronize() {
  ContextLock lock(*this);
  require(driver_->stream_synchronize(stream_), "cuStreamSynchronize");
}

std::unique_ptr<CudaDevice::Graph> CudaDevice::capture(const std::function<void()>& work) {
  ContextLock lock(*this);
  require(driver_->capture_begin(stream_, capture_thread_local), "cuStreamBeginCapture");
  bool failed = false;
  CUgraph_st* graph = nullptr;
  try {
    work();
  } catch (const Failure&) {
    failed = true;
  } catch (...) {  // ends the capture, since a capturing stream cannot be used otherwise
    if (driver_->capture_end(stream_, &graph) == success) driver_->graph_destroy(graph);
    throw;
  }
  CUgraphExec_st* executable = nullptr;
  if (driver_->capture_end(stream_, &graph) != success) return nullptr;
  if (!failed && driver_->graph_instantiate(&executable, graph, 0) != success) executable = nullptr;
  driver_->graph_destroy(graph);
  return executable == nullptr ? nullptr : std::make_unique<Graph>(*this, executable);
}

CudaDevice::Graph::~Graph() {
  ContextLock lock(device_);
  device_.driver_->graph_exec_destroy(executable_);
}

void CudaDevice::launch(const Graph& graph) {
  ContextLock lock(*this);
  require(driver_->graph_launch(graph.executable_, stream_), "cuGraphLaunch");
}

void CudaDevice::require(int error, const char* call) {
  if (error == success) return;
  throw Failure(Code::cannot_run_here, "CUDA failed on " + name_, text_of(error) + " (" + call + ")", "",
                "check the GPU with nvidia-smi (on a Jetson: tegrastats), or " + std::string(other_device));
}

std::string CudaDevice::text_of(int error) const {
  const char *name = nullptr, *text = nullptr;
  driver_->error_name(error, &name);
  driver_->error_string(error, &text);
  return std::string(name == nullptr ? "error " + std::to_string(error) : name) + " " +
         (text == nullptr ? "" : text);
}

CudaArray::CudaArray(CudaDevice& device, std::size_t bytes, bool pinned)
    : device_(device), bytes_(bytes), address_(device.allocate(bytes)) {
  try {
    if (pinned) host_ = device_.allocate_pinned(bytes);
  } catch (...) {
    device_.release(address_);
    throw;
  }
}

CudaArray::~CudaArray() {
  device_.release(address_);
  if (host_ != nullptr) device_.release_pinned(host_);
}

void* CudaStorage::allocate(std::size_t bytes) {
  void* address = device_->allocate(bytes);
  try {
    device_->clear(address, bytes);
  } catch (...) {
    device_->release(address);
    throw;
  }
  return address;
}

std::unique_ptr<CudaStorage> open_cuda_storage() {
  return std::make_unique<CudaStorage>(std::make_shared<CudaDevice>());
}

}  // namespace kvexport::detail
