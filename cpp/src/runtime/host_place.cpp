#include "runtime/host_place.hpp"

#include <cstdlib>
#include <cstring>
#include <string>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {
constexpr std::size_t ALIGNMENT = 256;
}

void* HostPlace::allocate(std::size_t bytes) {
  const std::size_t whole = bytes + (ALIGNMENT - bytes % ALIGNMENT) % ALIGNMENT;
  void* address = whole < bytes ? nullptr : std::aligned_alloc(ALIGNMENT, whole == 0 ? ALIGNMENT : whole);
  if (address == nullptr) {
    throw Failure(Code::cannot_run_here, "there is not enough memory for the KV cache", std::to_string(bytes) + " bytes", "",
                  "make caches of a smaller capacity");
  }
  std::memset(address, 0, whole);
  return address;
}

void HostPlace::release(void* address) noexcept { std::free(address); }

void HostPlace::clear(void* address, std::size_t bytes) { std::memset(address, 0, bytes); }

void HostPlace::upload(void* target, const void* host, std::size_t bytes) { std::memcpy(target, host, bytes); }

void HostPlace::download(void* host, const void* source, std::size_t bytes) { std::memcpy(host, source, bytes); }

void HostPlace::copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                          std::size_t width, std::size_t rows) {
  for (std::size_t row = 0; row < rows; ++row) {
    std::memcpy(static_cast<char*>(target) + row * target_pitch, static_cast<const char*>(source) + row * source_pitch, width);
  }
}

}  // namespace kvexport::detail
