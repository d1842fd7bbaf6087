// The first GPU through CUDA's driver API: memory, copies, one stream, graphs. libcuda.so.1 is opened at run
// time, so that no CUDA header is needed to build and no driver to load this library. Knows bytes and
// addresses; must not know what is computed.
//
// It has not been run on a GPU: none was at hand. Its tests run it on a driver that is simulated in the
// host's memory (tests/fake_cuda.cpp); names and signatures are those of the public cuda.h since CUDA 11.4.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "runtime/storage.hpp"

// As cuda.h and cuda_runtime_api.h call what their handles point to: a CUstream is a cudaStream_t.
struct CUctx_st;
struct CUgraphExec_st;
struct CUstream_st;

namespace kvexport::detail {

struct CudaDriver;  // libcuda's functions

// The device, its primary context and a stream of our own. Every call but those of memory is queued on the
// stream, in order. Any thread may call; all throw Failure (cannot_run_here) with CUDA's own words, but for
// those that are noexcept.
class CudaDevice {
 public:
  // Throws Failure: no driver, one too old, or no GPU.
  explicit CudaDevice(const char* library = "libcuda.so.1");
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // While it lives, the device's context is current in this thread, as CUDA's runtime inside an engine wants
  // it, and other threads wait before they queue anything: nothing of theirs is captured into a graph of
  // ours. May be nested. A context that cannot be entered is what the calls then refuse; at the end of a
  // process it may be gone before us.
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
  const std::string& compute_capability() const { return compute_capability_; }  // such as "8.7"
  CUstream_st* stream() const { return stream_; }
  DeviceMemory memory();  // free and total, as the driver says now

  void* allocate(std::size_t bytes);  // aligned to 256 bytes or more
  void release(void* address) noexcept;
  void* allocate_pinned(
      std::size_t bytes);  // the host's, which copies to and from the device need not wait for
  void release_pinned(void* address) noexcept;

  void clear(void* address, std::size_t bytes);
  void upload(void* target, const void* host, std::size_t bytes);
  void download(void* host, const void* source, std::size_t bytes);
  void copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                 std::size_t width, std::size_t rows);
  void synchronize();

  // What `work` queues, as a graph to launch again and again, without doing it; none where it cannot be
  // captured.
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
  bool context_pushed_ = false;  // the context, by the first of them
};

// Device memory, and where it is staged a pinned copy in the host's, given back with this object.
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

// The first GPU's memory; throws as CudaDevice does.
std::unique_ptr<CudaStorage> open_cuda_storage();

}  // namespace kvexport::detail
