// Memory of the host or of a GPU, behind one interface.
#pragma once

#include <cstddef>
#include <string>

namespace kvexport::detail {

// Memory of a device in bytes; 0: unknown.
struct DeviceMemory {
  std::string name;
  std::size_t free = 0, total = 0, weights = 0, activations = 0;
};

class Storage {
 public:
  virtual ~Storage() = default;

  // Zeroed memory, aligned to 256 bytes. Throws Failure (cannot_run_here) with the number of bytes if there
  // is not enough.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* address) noexcept = 0;

  // These calls run in order; they are complete when `synchronize` returns.
  virtual void clear(void* address, std::size_t bytes) = 0;
  virtual void upload(void* target, const void* host, std::size_t bytes) = 0;
  virtual void download(void* host, const void* source, std::size_t bytes) = 0;
  // Copies `rows` rows of `width` bytes. Pitch: distance between the starts of two rows in bytes. Source and
  // target must not overlap.
  virtual void copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                         std::size_t width, std::size_t rows) = 0;
  virtual void synchronize() = 0;

  virtual bool is_host() const noexcept = 0;
  // Name, free and total memory of the device, as the driver reports them.
  virtual DeviceMemory device_memory() { return {}; }
};

}  // namespace kvexport::detail
