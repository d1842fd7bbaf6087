// A bundle's manifest as typed data, checked while it is parsed. Opens no other file, and allocates no more
// memory than the manifest's own size justifies.
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
  std::string policy;  // "l2-norm", "window", "keep-high" or "random"
  std::int64_t budget = 0, protect_first = 0, protect_recent = 0;
  std::vector<std::int64_t> skip_layers;

  bool evicts(std::int64_t layer) const;
  std::int64_t chunk() const;            // largest number of prompt tokens in one call
  std::int64_t self_test_slots() const;  // slots that self-tests use
};

struct Layer {
  std::int64_t num_key_value_heads = 0, key_head_dim = 0, value_head_dim = 0;
  std::optional<std::int64_t> window;  // attention window in tokens; none: full attention
};

// The format of a stored weight: a float dtype, "int8" or "int4".
struct WeightFormat {
  std::string format;
  std::optional<std::int64_t> block;  // columns that share a scale; none: the whole row, or no scales

  bool is_integer() const;
  bool fits(Dtype dtype) const;  // whether a graph that computes in `dtype` can have such weights
};

struct FileEntry {
  std::string sha256;
  std::uint64_t bytes = 0;
};

struct Manifest {
  std::string version, source_name, digest;  // digest: the value of manifest_sha256
  std::int64_t vocab_size = 0, hidden_size = 0;
  std::optional<std::int64_t> max_position_embeddings, bos_token_id;
  std::vector<std::int64_t> eos_token_ids;
  Dtype dtype = Dtype::float32;        // of computation and cache
  std::vector<WeightFormat> weights;  // formats of the embedding, of the head, and of each layer's maps
  std::int64_t capacity = 0;
  std::optional<Eviction> eviction;
  std::vector<Layer> layers;
  std::map<std::string, FileEntry> files;

  bool evicts(std::int64_t layer) const { return eviction && eviction->evicts(layer); }
  // The window of a layer whose cache is a ring, which holds the window and the tokens of one call instead of
  // all tokens: the window is below the capacity, and the layer does not evict. None: its cache is no ring.
  std::optional<std::int64_t> ring_of(std::int64_t layer) const;
  bool quantized() const;  // whether any weight is stored as integers
  bool has(const std::string& file) const { return files.count(file) != 0; }
};

// Parses the content of manifest.json. `directory`: path of the bundle, for messages. Throws Failure if the
// format is not supported, the digest does not match, a key is missing or has another type or range, or parts
// contradict each other.
Manifest parse_manifest(std::string_view text, const std::string& directory);

}  // namespace kvexport::detail
