// Fuzzes the parser of engine records (build.json).
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "bundle/engine_record.hpp"
#include "bundle/error.hpp"

using namespace kvexport::detail;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const BuildRecord record = parse_record({reinterpret_cast<const char*>(data), size}, "fuzz");
    if (record.profiles.empty() || record.batch < 1 || record.capacity < 1 || record.chunk < 1) std::abort();
  } catch (const Failure&) {
  }
  return 0;
}
