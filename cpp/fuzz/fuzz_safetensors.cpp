// Fuzzes the safetensors header parser: in an accepted file all tensors lie within the file.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "bundle/error.hpp"
#include "bundle/safetensors.hpp"

using namespace kvexport::detail;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string_view file(reinterpret_cast<const char*>(data), size);
    const TensorHeader header = parse_header(file, size, "fuzz");
    std::uint64_t end = header.data;
    for (const TensorEntry& tensor : header.tensors) {
      if (header.data + tensor.begin != end || tensor.end < tensor.begin) std::abort();
      end = header.data + tensor.end;
      std::uint64_t numbers = 1;
      for (const std::int64_t each : tensor.shape) numbers *= static_cast<std::uint64_t>(each);
      if (numbers > tensor.bytes()) std::abort();
    }
    if (end != size) std::abort();
  } catch (const Failure&) {
  }
  return 0;
}
