// Memory of the host.
#pragma once

#include "runtime/storage.hpp"

namespace kvexport::detail {

class HostStorage : public Storage {
 public:
  // Writes to every page, so that a lack of memory shows here and not during generation.
  void* allocate(std::size_t bytes) override;
  void release(void* address) noexcept override;
  void clear(void* address, std::size_t bytes) override;
  void upload(void* target, const void* host, std::size_t bytes) override;
  void download(void* host, const void* source, std::size_t bytes) override;
  void copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                 std::size_t width, std::size_t rows) override;
  void synchronize() override {}
  bool is_host() const noexcept override { return true; }
};

}  // namespace kvexport::detail
