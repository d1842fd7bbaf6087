// Fuzzes the manifest parser. The digest is corrected first, since a wrong one would hide the rest of the
// parser.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "bundle/error.hpp"
#include "bundle/manifest.hpp"
#include "bundle/sha256.hpp"
#include "runtime/buffers.hpp"

using namespace kvexport::detail;

namespace {

std::string sealed(std::string text) {
  const std::string key = "\"manifest_sha256\": \"";
  const std::size_t at = text.find(key);
  if (at == std::string::npos || text.size() < at + key.size() + 64) return text;
  text.replace(at + key.size(), 64, 64, '0');
  return text.replace(at + key.size(), 64, sha256_of(text));
}

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text = sealed({reinterpret_cast<const char*>(data), size});
  try {
    const Manifest manifest = parse_manifest(text, "fuzz");
    require(!manifest.layers.empty() && manifest.capacity > 0 && manifest.has("decoder.onnx") &&
            manifest.digest.size() == 64);
    if (manifest.eviction)
      require(manifest.eviction->chunk() >= 1 && manifest.eviction->self_test_slots() <= manifest.capacity);
    require(Buffers::bytes_for(manifest, {manifest.capacity, 1}) > 0);  // sizes must be countable
  } catch (const Failure&) {
  }
  return 0;
}
