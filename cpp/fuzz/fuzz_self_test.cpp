// Fuzzes the parser of self_test.json, with the manifest of the seeds' bundle: two layers, 40 tokens,
// capacity 64.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "bundle/error.hpp"
#include "bundle/self_test_file.hpp"

using namespace kvexport::detail;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Manifest manifest = [] {
    Manifest made;
    made.vocab_size = 40, made.hidden_size = 32, made.capacity = 64;
    made.layers = {{2, 8, 8, std::nullopt}, {2, 8, 8, std::nullopt}};
    return made;
  }();
  try {
    const ReferenceOutputs reference =
        parse_reference_outputs({reinterpret_cast<const char*>(data), size}, manifest, "fuzz");
    if (reference.rows.empty() || reference.prompt < 1 || reference.tokens.size() > 64) std::abort();
    for (const Row& row : reference.rows) {
      if (row.values.size() != reference.logit_indices.size() || row.key_norms.size() != 2 ||
          row.value_norms.size() != 2)
        std::abort();
    }
  } catch (const Failure&) {
  }
  return 0;
}
