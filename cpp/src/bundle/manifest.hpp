// What a bundle's manifest says, as typed data: read from its bytes and checked. Opens no other file,
// allocates nothing that the bytes do not justify.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvexport::detail {

enum class Dtype { float32, float16, bfloat16 };
std::size_t size_of(Dtype dtype);
const char* name_of(Dtype dtype);

struct Eviction {
  std::string policy;  // "l2-norm", "window", "keep-high", "random"
  std::int64_t budget = 0, protect_first = 0, protect_recent = 0;
  std::vector<std::int64_t> skip_layers;

  bool evicts(std::int64_t layer) const;
  std::int64_t chunk() const;            // the most tokens of a prompt that are read at once
  std::int64_t self_test_slots() const;  // slots that self-tests run in
};

struct Layer {
  std::int64_t num_key_value_heads = 0, key_head_dim = 0, value_head_dim = 0;
  std::optional<std::int64_t> window;  // of its attention
};

struct FileEntry {
  std::string sha256;
  std::uint64_t bytes = 0;
};

struct Manifest {
  std::string version, source_name, digest;  // digest: manifest_sha256
  std::int64_t vocab_size = 0, hidden_size = 0;
  std::optional<std::int64_t> max_position_embeddings, bos_token_id;
  std::vector<std::int64_t> eos_token_ids;
  Dtype dtype = Dtype::float32;
  std::int64_t capacity = 0;
  std::optional<Eviction> eviction;
  std::vector<Layer> layers;
  std::map<std::string, FileEntry> files;

  bool evicts(std::int64_t layer) const { return eviction && eviction->evicts(layer); }
  bool has(const std::string& file) const { return files.count(file) != 0; }
};

// `text`: manifest.json's bytes. `where`: the bundle, for messages. Throws Failure: another format, a digest
// that does not match, a key missing or of the wrong type or range, parts that contradict each other.
Manifest parse_manifest(std::string_view text, const std::string& where);

}  // namespace kvexport::detail
