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

constexpr std::int64_t format = 3;
constexpr const char* rebuild = "build the bundle again: kvexport build CHECKPOINT -o BUNDLE";
constexpr std::string_view digest_key = "\"manifest_sha256\": \"";
constexpr std::size_t digest_digits = 64;
constexpr std::int64_t max_positions = 1 << 19;  // with eviction, as kvexport/eviction/config.py
constexpr std::int64_t max_layer_size = std::int64_t{1} << 53;  // heads, widths and parameters
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

void require_format(const Table& table, const std::string& directory) {
  if (!table.contains("format")) table.fail("format", std::to_string(format));
  const Json& number = table.value("format");
  if (number.is_number_integer() && number == format) return;
  const bool older = number.is_number_integer() && number < format;
  const Json& written = table.value("kvexport");
  throw bundle_error(
      "the format of the bundle " + directory + " must be supported by this version of kvexport",
      "format " + for_message(number) + ", written by kvexport " +
          (written.is_null() ? "of unknown version" : for_message(written)),
      "format " + std::to_string(format),
      older ? rebuild : std::string("update kvexport to that version or later, or ") + rebuild);
}

Layer layer_of(const Table& table) {
  Layer layer;
  table.string("method");
  for (const char* key : {"num_attention_heads", "original_num_key_value_heads", "original_head_dim"})
    table.integer(key, 1, max_layer_size);
  layer.num_key_value_heads = table.integer("num_key_value_heads", 1, max_layer_size);
  layer.key_head_dim = table.integer("key_head_dim", 1, max_layer_size);
  layer.value_head_dim = table.integer("value_head_dim", 1, max_layer_size);
  for (const char* key : {"predicted_error", "measured_error", "residual_error"}) table.number(key);
  for (const char* key : {"parameters", "original_parameters"}) table.integer(key, 1, max_layer_size);
  layer.window = table.optional_integer("window", 1, max_layer_size);
  return layer;
}

WeightFormat weight_format_of(const Table& table) {
  WeightFormat weight;
  weight.block = table.optional_integer("block", 1, max_layer_size);
  weight.format = table.string("format", {"float32", "float16", "bfloat16", "int8", "int4"});
  return weight;
}

// Reads the formats of all weights, in the order of Manifest::weights; returns the number of layers.
std::size_t read_weights(const Table& table, std::vector<WeightFormat>& weights) {
  weights.push_back(weight_format_of(table.table("embedding")));
  weights.push_back(weight_format_of(table.table("head")));
  const std::vector<Table> layers = table.tables("layers");
  for (const Table& layer : layers) {
    for (const Table& share : layer.tables("maps")) {
      weights.push_back(weight_format_of(share));
      share.integer("parameters", 1, max_layer_size);
    }
  }
  return layers.size();
}

void require_weights(const Manifest& manifest, std::size_t num_layers) {
  if (num_layers != manifest.layers.size()) {
    throw inconsistent("the manifest's weights must describe num_hidden_layers layers",
                       std::to_string(num_layers), std::to_string(manifest.layers.size()));
  }
  for (const WeightFormat& weight : manifest.weights) {
    if (!weight.fits(manifest.dtype)) {
      throw inconsistent("the manifest's weights must have formats that its dtype allows",
                         weight.block ? weight.format + ", blocks of " + std::to_string(*weight.block)
                                      : weight.format,
                         name_of(manifest.dtype) + std::string(", int8, or int4 with a block"));
    }
  }
}

bool is_plain_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name != manifest_file &&
         name.find_first_of("/\\") == std::string::npos && printable(name);
}

std::map<std::string, FileEntry> files_of(const Table& table) {
  std::map<std::string, FileEntry> files;
  for (const std::string& name : table.keys()) {
    if (!is_plain_file_name(name))
      throw inconsistent("the manifest must list files of the bundle by their plain names",
                         for_message(name));
    const Table entry = table.table(name);
    const std::string sha256 = entry.string("sha256");
    files[name] = {sha256, static_cast<std::uint64_t>(entry.integer("bytes", 0))};
  }
  return files;
}

Failure eviction_error(const std::string& problem, const std::string& got, const std::string& expected = {}) {
  return inconsistent("the manifest's eviction must be possible: " + problem, got, expected);
}

Eviction eviction_of(const Table& table) {
  Eviction eviction;
  eviction.policy = table.string("policy");
  eviction.budget = table.integer("budget");
  eviction.protect_first = table.integer("protect_first");
  eviction.protect_recent = table.integer("protect_recent");
  eviction.skip_layers = table.integers("skip_layers");
  if (std::find(std::begin(policies), std::end(policies), eviction.policy) == std::end(policies))
    throw eviction_error("--evict must be a known policy", eviction.policy);
  if (eviction.protect_first < 0)
    throw eviction_error("--protect-first must be at least 0 tokens", std::to_string(eviction.protect_first));
  if (eviction.protect_recent < 0)
    throw eviction_error("--protect-recent must be at least 0 tokens",
                         std::to_string(eviction.protect_recent));
  // Subtracts numbers that were checked above, since a sum could overflow.
  if (eviction.budget <= eviction.protect_first ||
      eviction.budget - eviction.protect_first <= std::max<std::int64_t>(1, eviction.protect_recent)) {
    throw eviction_error("--kv-budget must leave a token that can be evicted",
                         std::to_string(eviction.budget) + " tokens");
  }
  table.only({"budget", "policy", "protect_first", "protect_recent", "skip_layers"});
  return eviction;
}

void require_fit(const Eviction& eviction, std::int64_t capacity, std::int64_t num_layers) {
  if (capacity > max_positions) {
    throw eviction_error("--capacity must be at most " + std::to_string(max_positions) + " with --kv-budget",
                         std::to_string(capacity));
  }
  if (eviction.budget > capacity) {
    throw eviction_error("--kv-budget must be at most the capacity",
                         std::to_string(eviction.budget) + " tokens", "at most " + std::to_string(capacity));
  }
  for (const std::int64_t layer : eviction.skip_layers) {
    if (layer < 0 || layer >= num_layers) {
      throw eviction_error("--evict-skip-layers must name layers of the model", std::to_string(layer),
                           "0 to " + std::to_string(num_layers - 1));
    }
  }
  const std::set<std::int64_t> skipped(eviction.skip_layers.begin(), eviction.skip_layers.end());
  if (static_cast<std::int64_t>(skipped.size()) == num_layers) {
    throw eviction_error("--evict-skip-layers must leave a layer that evicts",
                         std::to_string(num_layers) + " layers");
  }
}

Dtype dtype_named(const std::string& name) {
  return std::find_if(std::begin(dtypes), std::end(dtypes),
                      [&](const auto& each) { return each.first == name; })
      ->second;
}

Json tensor(const std::string& name, const std::string& dtype, Json shape) {
  return {{"name", name}, {"dtype", dtype}, {"shape", std::move(shape)}};
}

// The "graph" object that follows from the rest of the manifest.
Json derived_graph(const Manifest& manifest) {
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
    const std::optional<std::int64_t> ring = manifest.ring_of(static_cast<std::int64_t>(i));
    const std::string slots = ring ? "window_" + std::to_string(*ring) : "capacity";
    any_evicts = any_evicts || evicts;
    const auto cached = [&](const char* which, const std::string& of, std::int64_t width) {
      const std::string name = "." + std::to_string(i) + "." + which;
      const Json shape =
          evicts ? Json::array({"batch*" + std::to_string(layer.num_key_value_heads), 1, "budget", width})
                 : Json::array({"batch", layer.num_key_value_heads, slots, width});
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

void require_tensors(const Table& graph, const std::string& key) {
  for (const Table& tensor : graph.tables(key)) {
    for (const Json& size : tensor.list("shape"))
      if (!size.is_number_integer() && !size.is_string())
        tensor.fail("shape", "a list of integers and names");
    tensor.string("name");
    tensor.string("dtype");
    tensor.only({"dtype", "name", "shape"});
  }
}

constexpr const char* graph_sizes[] = {"capacity", "vocab_size", "hidden_size", "num_layers"};

// Checks the types of the "graph" object's values.
void require_graph_types(const Table& graph) {
  graph.string("variant");
  graph.integer("opset");
  graph.string("dtype");
  for (const char* key : graph_sizes) graph.integer(key);
  require_tensors(graph, "inputs");
  require_tensors(graph, "outputs");
  graph.only({"capacity", "dtype", "hidden_size", "inputs", "num_layers", "opset", "outputs", "variant",
              "vocab_size"});
}

void require_graph(const Manifest& manifest, const Table& graph) {
  const Json derived = derived_graph(manifest);
  std::vector<std::string> keys{"variant", "opset", "dtype"};
  keys.insert(keys.end(), std::begin(graph_sizes), std::end(graph_sizes));
  keys.insert(keys.end(), {"inputs", "outputs"});
  for (const std::string& key : keys) {
    if (graph.value(key) != derived.at(key)) {
      throw inconsistent(
          "the manifest's graph." + key + " must agree with its layers, model, dtype and capacity",
          for_message(graph.value(key)), for_message(derived.at(key)));
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
  if (!fits) throw inconsistent("the sizes in the manifest must fit in the memory of a machine");
}

}  // namespace

std::size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

const char* name_of(Dtype dtype) {
  for (const auto& [name, match] : dtypes) {
    if (match == dtype) return name;
  }
  return "";
}

bool WeightFormat::is_integer() const { return format == "int8" || format == "int4"; }

bool WeightFormat::fits(Dtype dtype) const {
  return is_integer() ? format == "int8" || block : format == name_of(dtype) && !block;
}

bool Manifest::quantized() const {
  return std::any_of(weights.begin(), weights.end(), [](const auto& each) { return each.is_integer(); });
}

bool Eviction::evicts(std::int64_t layer) const {
  return std::find(skip_layers.begin(), skip_layers.end(), layer) == skip_layers.end();
}

std::int64_t Eviction::chunk() const { return std::max<std::int64_t>(1, (budget - protect_first) / 4); }

std::int64_t Eviction::self_test_slots() const {
  return std::min(budget, protect_first + std::max<std::int64_t>(1, protect_recent) + 16);
}

std::optional<std::int64_t> Manifest::ring_of(std::int64_t layer) const {
  const std::optional<std::int64_t> window = layers[static_cast<std::size_t>(layer)].window;
  return window && *window < capacity && !evicts(layer) ? window : std::nullopt;
}

Manifest parse_manifest(std::string_view text, const std::string& directory) {
  const std::string path = std::string(manifest_file) + " of the bundle " + directory;
  const Json raw = parse_json(text, path, rebuild);
  const Table table(raw, path, rebuild);
  require_format(table, directory);
  Manifest manifest;
  manifest.digest = digest_of(text);
  if (manifest.digest.empty()) {
    throw bundle_error(path + " must be unchanged since it was written: its sha256 differs", {}, {},
                       std::string("copy the bundle again, or ") + rebuild);
  }

  const Table model = table.table("model"), source = table.table("source");
  if (table.has("calibration")) table.table("calibration");
  manifest.version = table.string("kvexport");
  table.string("manifest_sha256");
  manifest.source_name = source.string("name");
  for (const char* key : {"model_type", "sha256"}) source.string(key);
  manifest.vocab_size = model.integer("vocab_size", 1);
  manifest.hidden_size = model.integer("hidden_size", 1);
  const std::int64_t num_layers = model.integer("num_hidden_layers", 1);
  manifest.max_position_embeddings = model.optional_integer("max_position_embeddings");
  manifest.bos_token_id = model.optional_integer("bos_token_id");
  manifest.eos_token_ids = model.integers("eos_token_ids");
  if (model.has("tie_word_embeddings")) model.boolean("tie_word_embeddings");
  manifest.dtype = dtype_named(table.string("dtype", {"float32", "float16", "bfloat16"}));
  const std::size_t weight_layers = read_weights(table.table("weights"), manifest.weights);
  manifest.capacity = table.integer("capacity", 1);
  if (table.has("eviction")) manifest.eviction = eviction_of(table.table("eviction"));
  for (const Table& layer : table.tables("layers")) manifest.layers.push_back(layer_of(layer));
  const Table graph = table.table("graph");
  require_graph_types(graph);
  manifest.files = files_of(table.table("files"));

  const auto layers = static_cast<std::int64_t>(manifest.layers.size());
  if (layers != num_layers) {
    throw inconsistent("the manifest must describe num_hidden_layers layers", std::to_string(layers),
                       std::to_string(num_layers));
  }
  if (manifest.eviction) require_fit(*manifest.eviction, manifest.capacity, num_layers);
  for (const char* name : {graph_file, data_file}) {
    if (!manifest.has(name)) throw inconsistent(std::string("the manifest must list ") + name);
  }
  require_graph(manifest, graph);
  require_weights(manifest, weight_layers);
  require_countable(manifest);
  return manifest;
}

}  // namespace kvexport::detail
