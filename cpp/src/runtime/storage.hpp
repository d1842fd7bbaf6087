// Where memory is: the host's, or a GPU's behind the same few calls. Knows bytes and addresses, not what they
// mean.
#pragma once

#include <cstddef>
#include <string>

namespace kvexport::detail {

// What is known of a device's memory, in bytes; 0 where it is not told.
struct DeviceMemory {
  std::string name;
  std::size_t free = 0, total = 0, weights = 0, activations = 0;
};

class Storage {
 public:
  virtual ~Storage() = default;

  // Zeroed, aligned to 256 bytes. Throws Failure (cannot_run_here) where there is not enough, saying how many
  // bytes.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* address) noexcept = 0;

  // All of these are done in order, and done when `synchronize` returns.
  virtual void clear(void* address, std::size_t bytes) = 0;
  virtual void upload(void* target, const void* host, std::size_t bytes) = 0;
  virtual void download(void* host, const void* source, std::size_t bytes) = 0;
  // `rows` rows of `width` bytes, whose beginnings are `pitch` bytes apart; source and target do not overlap.
  virtual void copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                         std::size_t width, std::size_t rows) = 0;
  virtual void synchronize() = 0;

  virtual bool is_host() const noexcept = 0;
  // Of a device: its name, and what the driver says is free now, and in all.
  virtual DeviceMemory device_memory() { return {}; }
};

}  // namespace kvexport::detail
