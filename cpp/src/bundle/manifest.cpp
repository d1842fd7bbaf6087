#include "bundle/manifest.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "bundle/bundle.hpp"
#include "bundle/error.hpp"
#include "bundle/json.hpp"
#include "bundle/sha256.hpp"

namespace kvexport::detail {

namespace {

constexpr std::int64_t format = 2;
constexpr const char* rebuild = "build the bundle again: kvexport build CHECKPOINT -o BUNDLE";
constexpr std::string_view digest_key = "\"manifest_sha256\": \"";
constexpr std::size_t digest_digits = 64;
constexpr std::int64_t most_positions =
    1 << 19;  // highest capacity with eviction, as kvexport/eviction/config.py
constexpr std::int64_t opset = 24;
constexpr std::pair<const char*, Dtype> dtypes[] = {
    {"float32", Dtype::float32}, {"float16", Dtype::float16}, {"bfloat16", Dtype::bfloat16}};
constexpr const char* policies[] = {"l2-norm", "window", "keep-high", "random"};

Failure inconsistent(const std::string& problem, const std::string& got = {},
                     const std::string& expected = {}) {
  return bundle_error(problem, got, expected, rebuild);
}

// The manifest's own digest, computed with its 64 digits replaced by zeros; "" if it does not match.
std::string digest_of(std::string_view text) {
  const std::size_t key = text.find(digest_key);
  if (key == std::string_view::npos || text.find(digest_key, key + 1) != std::string_view::npos) return {};
  const std::size_t at = key + digest_key.size();
  if (text.size() <= at + digest_digits || text[at + digest_digits] != '"') return {};
  const std::string stored_digest(text.substr(at, digest_digits));
  Sha256 digest;
  digest.update(text.data(), at);
  digest.update(std::string(digest_digits, '0').data(), digest_digits);
  digest.update(text.data() + at + digest_digits, text.size() - at - digest_digits);
  return digest.hex() == stored_digest ? stored_digest : std::string();
}

Failure other_format(const Json& raw, const std::string& where) {
  const Json& got = raw.at("format");
  const auto written = raw.find("kvexport");
  const bool older = got.is_number_integer() && got < format;
  return bundle_error(
      "the bundle " + where + " is of a format that this version of kvexport does not read",
      "format " + for_message(got) + ", written by kvexport " +
          (written == raw.end() ? "of unknown version" : for_message(*written)),
      "format " + std::to_string(format),
      older ? rebuild : std::string("update kvexport to that version or later, or ") + rebuild);
}

Layer layer_of(const Reader& raw) {
  Layer layer;
  raw.printable_string("method");
  for (const char* key : {"num_attention_heads", "original_num_key_value_heads", "original_head_dim"})
    raw.positive_integer(key);
  layer.num_key_value_heads = raw.positive_integer("num_key_value_heads");
  layer.key_head_dim = raw.positive_integer("key_head_dim");
  layer.value_head_dim = raw.positive_integer("value_head_dim");
  for (const char* key : {"predicted_error", "measured_error", "residual_error"}) raw.number(key);
  for (const char* key : {"parameters", "original_parameters"}) raw.positive_integer(key);
  layer.window = raw.optional_positive_integer("window");
  return layer;
}

bool is_plain_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name != manifest_file &&
         name.find_first_of("/\\") == std::string::npos && printable(name);
}

std::map<std::string, FileEntry> files_of(const Reader& manifest) {
  const Reader raw = manifest.object("files");
  std::map<std::string, FileEntry> files;
  for (const std::string& name : raw.keys()) {
    if (!is_plain_file_name(name)) {
      throw bundle_error("the manifest lists a file that is not one of the bundle's", for_message(Json(name)),
                         "plain names of files beside it");
    }
    const Reader entry = raw.entry(name);
    const std::string sha256 = entry.printable_string("sha256");
    const std::int64_t bytes = entry.integer("bytes");
    if (bytes < 0) entry.fail("bytes", "is impossible", "0 or more");
    files[name] = {sha256, static_cast<std::uint64_t>(bytes)};
  }
  for (const char* name : {graph_file, data_file}) {
    if (files.count(name) == 0) throw inconsistent(std::string("the manifest does not list ") + name);
  }
  return files;
}

Failure eviction_error(const std::string& problem, const std::string& got) {
  return inconsistent("the manifest's eviction is impossible: " + problem, got);
}

Eviction eviction_of(const Reader& raw) {
  Eviction eviction;
  const std::set<std::string> match{"policy", "budget", "protect_first", "protect_recent", "skip_layers"};
  for (const std::string& key : raw.keys()) {
    if (match.count(key) == 0) raw.fail(key, "is not known");
  }
  eviction.policy = raw.printable_string("policy");
  eviction.budget = raw.integer("budget");
  eviction.protect_first = raw.integer("protect_first");
  eviction.protect_recent = raw.integer("protect_recent");
  eviction.skip_layers = raw.integers("skip_layers");
  if (std::find(std::begin(policies), std::end(policies), eviction.policy) == std::end(policies))
    throw eviction_error("there is no such policy of eviction", eviction.policy);
  if (eviction.protect_first < 0)
    throw eviction_error("--protect-first is out of range", std::to_string(eviction.protect_first));
  if (eviction.protect_recent < 0)
    throw eviction_error("--protect-recent is out of range", std::to_string(eviction.protect_recent));
  // Subtracts numbers that were checked above, since a sum could overflow.
  if (eviction.budget <= eviction.protect_first ||
      eviction.budget - eviction.protect_first <= std::max<std::int64_t>(1, eviction.protect_recent))
    throw eviction_error("--kv-budget leaves no token that may go",
                         std::to_string(eviction.budget) + " tokens");
  return eviction;
}

void require_fit(const Eviction& eviction, std::int64_t capacity, std::int64_t num_layers) {
  if (capacity > most_positions)
    throw eviction_error("a cache that evicts cannot count as many positions", std::to_string(capacity));
  if (eviction.budget > capacity) {
    throw eviction_error("--kv-budget is larger than the capacity, so that nothing would ever go",
                         std::to_string(eviction.budget) + " tokens");
  }
  for (const std::int64_t layer : eviction.skip_layers) {
    if (layer < 0 || layer >= num_layers)
      throw eviction_error("--evict-skip-layers names a layer that the model does not have",
                           std::to_string(layer));
  }
  const std::set<std::int64_t> skipped(eviction.skip_layers.begin(), eviction.skip_layers.end());
  if (static_cast<std::int64_t>(skipped.size()) == num_layers)
    throw eviction_error("--evict-skip-layers names every layer, so that nothing would ever go",
                         std::to_string(num_layers) + " layers");
}

Json tensor(const std::string& name, const std::string& dtype, Json shape) {
  return {{"name", name}, {"dtype", dtype}, {"shape", std::move(shape)}};
}

// The "graph" object that follows from the rest of the manifest.
Json promised(const Manifest& manifest) {
  const std::string dtype = name_of(manifest.dtype);
  Json inputs = Json::array({tensor("input_ids", "int64", {"batch", "sequence"}),
                             tensor("position_ids", "int64", {"batch", "sequence"}),
                             tensor("write_indices", "int64", Json::array({"batch"})),
                             tensor("logits_index", "int64", {"batch", "logits"})});
  Json outputs = Json::array({tensor("logits", "float32", {"batch", "logits", manifest.vocab_size})});
  bool any_evicts = false;
  for (std::size_t i = 0; i < manifest.layers.size(); ++i) {
    const Layer& layer = manifest.layers[i];
    const bool evicts = manifest.evicts(static_cast<std::int64_t>(i));
    any_evicts = any_evicts || evicts;
    const auto cached = [&](const char* which, const std::string& of, std::int64_t width) {
      const std::string name = "." + std::to_string(i) + "." + which;
      const Json shape =
          evicts ? Json::array({"batch*" + std::to_string(layer.num_key_value_heads), 1, "budget", width})
                 : Json::array({"batch", layer.num_key_value_heads, "capacity", width});
      inputs.push_back(tensor("past_key_values" + name, of, shape));
      outputs.push_back(tensor("present" + name, of, shape));
    };
    cached("key", dtype, layer.key_head_dim);
    cached("value", dtype, layer.value_head_dim);
    if (evicts) cached("state", "float32", 2);
  }
  return {{"variant", any_evicts ? "std24-evicting" : "std24"},
          {"opset", opset},
          {"dtype", dtype},
          {"capacity", manifest.capacity},
          {"vocab_size", manifest.vocab_size},
          {"hidden_size", manifest.hidden_size},
          {"num_layers", manifest.layers.size()},
          {"inputs", std::move(inputs)},
          {"outputs", std::move(outputs)}};
}

void require_graph(const Manifest& manifest, const Reader& reader) {
  const Reader graph = reader.object("graph");
  const Json promised_graph = promised(manifest);
  for (const std::string& key : graph.keys()) {
    if (!promised_graph.contains(key)) graph.fail(key, "is not known");
  }
  for (const auto& [key, value] : promised_graph.items()) {
    if (graph.value(key) != value) {
      throw inconsistent("the manifest's graph." + key + " contradicts its layers, model, dtype or capacity",
                         for_message(graph.value(key)), for_message(value));
    }
  }
}

// Bounds all sizes that are computed from the manifest, so that none of them can overflow.
void require_countable(const Manifest& manifest) {
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max() / 64;
  std::int64_t total = 0;
  bool fits = manifest.vocab_size <= std::numeric_limits<std::int32_t>::max() &&
              manifest.capacity <= std::numeric_limits<std::int32_t>::max();
  for (const Layer& layer : manifest.layers) {
    std::int64_t bytes = 0;
    const bool counted = !__builtin_add_overflow(layer.key_head_dim, layer.value_head_dim, &bytes) &&
                         !__builtin_add_overflow(bytes, 2, &bytes) &&  // the eviction state
                         !__builtin_mul_overflow(bytes, layer.num_key_value_heads, &bytes) &&
                         !__builtin_mul_overflow(bytes, 4, &bytes) &&
                         !__builtin_mul_overflow(bytes, manifest.capacity, &bytes) &&
                         !__builtin_add_overflow(total, bytes, &total);
    fits = fits && counted && total <= most;
  }
  if (!fits) throw inconsistent("the manifest describes a larger model or cache than any machine holds");
}

}  // namespace

std::size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

const char* name_of(Dtype dtype) {
  for (const auto& [name, match] : dtypes) {
    if (match == dtype) return name;
  }
  return "";
}

bool Eviction::evicts(std::int64_t layer) const {
  return std::find(skip_layers.begin(), skip_layers.end(), layer) == skip_layers.end();
}

std::int64_t Eviction::chunk() const { return std::max<std::int64_t>(1, (budget - protect_first) / 4); }

std::int64_t Eviction::self_test_slots() const {
  return std::min(budget, protect_first + std::max<std::int64_t>(1, protect_recent) + 16);
}

Manifest parse_manifest(std::string_view text, const std::string& where) {
  const Json raw = parse_json(text, "the manifest of " + where, rebuild);
  if (!raw.is_object() || !raw.contains("format"))
    throw inconsistent("the manifest of " + where + " is not a bundle's");
  if (!raw["format"].is_number_integer() || raw["format"] != format) throw other_format(raw, where);
  Manifest manifest;
  manifest.digest = digest_of(text);
  if (manifest.digest.empty()) {
    throw bundle_error(std::string(manifest_file) + " of the bundle " + where +
                           " is not as it was written: its sha256 differs",
                       {}, {}, std::string("copy the bundle again, or ") + rebuild);
  }

  const Reader reader(raw, "the manifest", "", rebuild);
  const Reader model = reader.object("model"), source = reader.object("source");
  manifest.version = reader.printable_string("kvexport");
  manifest.source_name = source.printable_string("name");
  for (const char* key : {"model_type", "sha256"}) source.printable_string(key);
  if (reader.has("calibration")) reader.object("calibration");
  manifest.vocab_size = model.positive_integer("vocab_size");
  manifest.hidden_size = model.positive_integer("hidden_size");
  const std::int64_t num_layers = model.positive_integer("num_hidden_layers");
  manifest.max_position_embeddings = model.optional_integer("max_position_embeddings");
  manifest.bos_token_id = model.optional_integer("bos_token_id");
  manifest.eos_token_ids = model.integers("eos_token_ids");
  const std::string dtype = reader.printable_string("dtype");
  manifest.capacity = reader.positive_integer("capacity");
  if (reader.has("eviction")) manifest.eviction = eviction_of(reader.object("eviction"));
  for (const Reader& layer : reader.objects("layers")) manifest.layers.push_back(layer_of(layer));
  manifest.files = files_of(reader);

  const auto match = std::find_if(std::begin(dtypes), std::end(dtypes),
                                  [&](const auto& each) { return each.first == dtype; });
  if (match == std::end(dtypes))
    throw bundle_error("the manifest's dtype is not one that bundles have", dtype,
                       "float32, float16, bfloat16");
  manifest.dtype = match->second;
  const auto num_described = static_cast<std::int64_t>(manifest.layers.size());
  if (num_described != num_layers) {
    throw inconsistent("the manifest describes another number of layers than its num_hidden_layers",
                       std::to_string(num_described), std::to_string(num_layers));
  }
  if (manifest.eviction) require_fit(*manifest.eviction, manifest.capacity, num_layers);
  require_graph(manifest, reader);
  require_countable(manifest);
  return manifest;
}

}  // namespace kvexport::detail
