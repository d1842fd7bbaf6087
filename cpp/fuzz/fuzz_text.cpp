// Fuzzes the parser of text.json: tokenizer samples, chat strings and sample conversations.
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
