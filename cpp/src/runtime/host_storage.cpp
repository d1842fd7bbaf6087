#include "runtime/host_storage.hpp"

#include <cstdlib>
#include <cstring>
#include <string>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {
constexpr std::size_t ALIGNMENT = 256;
}

void* HostStorage::allocate(std::size_t bytes) {
  const std::size_t padded = bytes + (ALIGNMENT - bytes % ALIGNMENT) % ALIGNMENT;
  void* address = padded < bytes ? nullptr : std::aligned_alloc(ALIGNMENT, padded == 0 ? ALIGNMENT : padded);
  if (address == nullptr) {
    throw Failure(Code::cannot_run_here, "there is not enough memory for the KV cache",
                  std::to_string(bytes) + " bytes", "", "use a smaller cache capacity");
  }
  std::memset(address, 0, padded);
  return address;
}

void HostStorage::release(void* address) noexcept { std::free(address); }

void HostStorage::clear(void* address, std::size_t bytes) { std::memset(address, 0, bytes); }

void HostStorage::upload(void* target, const void* host, std::size_t bytes) {
  std::memcpy(target, host, bytes);
}

void HostStorage::download(void* host, const void* source, std::size_t bytes) {
  std::memcpy(host, source, bytes);
}

void HostStorage::copy_rows(void* target, std::size_t target_pitch, const void* source,
                            std::size_t source_pitch, std::size_t width, std::size_t rows) {
  for (std::size_t row = 0; row < rows; ++row) {
    std::memcpy(static_cast<char*>(target) + row * target_pitch,
                static_cast<const char*>(source) + row * source_pitch, width);
  }
}

}  // namespace kvexport::detail
