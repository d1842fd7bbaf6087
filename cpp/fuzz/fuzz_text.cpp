// text.json: golden vectors and the chat's strings, which must give the conversations of the same file.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "bundle/error.hpp"
#include "bundle/text_file.hpp"

using namespace kvexport::detail;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    if (parse_text({reinterpret_cast<const char*>(data), size}).samples.empty()) std::abort();
  } catch (const Failure&) {
  }
  return 0;
}
