// The first GPU through CUDA's driver API: memory, copies, one stream, and graphs. libcuda.so.1 is opened at
// run time: building needs no CUDA headers, and loading this library needs no driver.
//
// Not yet run on a GPU. The tests run it on a driver that is simulated in host memory
// (tests/gpu/fake_cuda.cpp). Names and signatures are those of the public cuda.h since CUDA 11.4.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "runtime/storage.hpp"

// The handle types of cuda.h and cuda_runtime_api.h; a CUstream is a cudaStream_t.
struct CUctx_st;
struct CUgraphExec_st;
struct CUstream_st;

namespace kvexport::detail {

struct CudaDriver;  // function table of libcuda

// The device, its primary context and one stream. All calls but those that allocate or release memory are
// queued on the stream, in order. Usable from any thread. All calls throw Failure (cannot_run_here) with
// CUDA's message, except those that are noexcept.
class CudaDevice {
 public:
  // Throws Failure if there is no driver, it is too old, or there is no GPU.
  explicit CudaDevice(const char* library = "libcuda.so.1");
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // Locks the device for this thread and makes its context current, as the CUDA runtime inside an engine
  // requires. Other threads wait, so that none of their work is captured into a graph of this thread. May be
  // nested. If the context cannot be made current, e.g. at the end of the process, the calls made under the
  // lock fail.
  class ContextLock {
   public:
    explicit ContextLock(CudaDevice& device) noexcept;
    ~ContextLock();
    ContextLock(const ContextLock&) = delete;
    ContextLock& operator=(const ContextLock&) = delete;

   private:
    CudaDevice& device_;
    std::unique_lock<std::recursive_mutex> lock_;
  };

  const std::string& name() const { return name_; }
  const std::string& compute_capability() const { return compute_capability_; }  // e.g. "8.7"
  CUstream_st* stream() const { return stream_; }
  DeviceMemory memory();  // free and total bytes, as the driver reports them now

  void* allocate(std::size_t bytes);  // aligned to 256 bytes or more
  void release(void* address) noexcept;
  void* allocate_pinned(std::size_t bytes);  // page-locked host memory, for asynchronous copies
  void release_pinned(void* address) noexcept;

  void clear(void* address, std::size_t bytes);
  void upload(void* target, const void* host, std::size_t bytes);
  void download(void* host, const void* source, std::size_t bytes);
  void copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                 std::size_t width, std::size_t rows);
  void synchronize();

  // Captures the calls that `work` makes into a graph without running them. Null if they cannot be captured.
  class Graph {
   public:
    Graph(CudaDevice& device, CUgraphExec_st* executable) : device_(device), executable_(executable) {}
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

   private:
    friend class CudaDevice;
    CudaDevice& device_;
    CUgraphExec_st* executable_;
  };
  std::unique_ptr<Graph> capture(const std::function<void()>& work);
  void launch(const Graph& graph);

 private:
  void open_device();
  void require(int error, const char* call);
  std::string text_of(int error) const;

  std::unique_ptr<CudaDriver> driver_;
  std::string name_ = "device 0", compute_capability_;
  int device_ = 0;
  CUctx_st* context_ = nullptr;
  CUstream_st* stream_ = nullptr;
  std::recursive_mutex mutex_;
  int lock_depth_ = 0;           // of the thread that holds the mutex
  bool context_pushed_ = false;  // whether the outermost lock made the context current
};

// Device memory, and optionally a pinned buffer of the same size in host memory.
class CudaArray {
 public:
  CudaArray(CudaDevice& device, std::size_t bytes, bool pinned);
  ~CudaArray();
  CudaArray(const CudaArray&) = delete;
  CudaArray& operator=(const CudaArray&) = delete;

  template <typename Value>
  Value* host() const {
    return static_cast<Value*>(host_);
  }
  void* address() const { return address_; }
  std::size_t bytes() const { return bytes_; }

 private:
  CudaDevice& device_;
  std::size_t bytes_;
  void* address_;
  void* host_ = nullptr;
};

class CudaStorage final : public Storage {
 public:
  explicit CudaStorage(std::shared_ptr<CudaDevice> device) : device_(std::move(device)) {}

  void* allocate(std::size_t bytes) override;
  void release(void* address) noexcept override { device_->release(address); }
  void clear(void* address, std::size_t bytes) override { device_->clear(address, bytes); }
  void upload(void* target, const void* host, std::size_t bytes) override {
    device_->upload(target, host, bytes);
  }
  void download(void* host, const void* source, std::size_t bytes) override {
    device_->download(host, source, bytes);
  }
  void copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                 std::size_t width, std::size_t rows) override {
    device_->copy_rows(target, target_pitch, source, source_pitch, width, rows);
  }
  void synchronize() override { device_->synchronize(); }
  bool is_host() const noexcept override { return false; }
  DeviceMemory device_memory() override { return device_->memory(); }
  CudaDevice& device() { return *device_; }

 private:
  std::shared_ptr<CudaDevice> device_;
};

// Memory of the first GPU. Throws as CudaDevice does.
std::unique_ptr<CudaStorage> open_cuda_storage();

}  // namespace kvexport::detail
