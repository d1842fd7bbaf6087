#include "bundle/self_test_file.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bundle/error.hpp"
#include "bundle/file.hpp"
#include "bundle/json.hpp"

namespace kvexport::detail {

namespace {

constexpr const char* FILE_NAME = "self_test.json";
constexpr const char* REBUILD = "build the bundle again: kvexport build CHECKPOINT -o BUNDLE";
constexpr std::int64_t FORMAT = 1;
constexpr std::size_t LARGEST = std::size_t{1} << 26;  // size limit of the file in bytes

std::vector<double> numbers(const Table& table, const char* key, std::size_t count) {
  std::vector<double> values = table.numbers(key);
  if (values.size() != count) table.fail(key, std::to_string(count) + " numbers");
  return values;
}

Row row_of(const Table& table, std::size_t values, const Manifest& manifest) {
  const std::size_t layers = manifest.layers.size();
  Row row;
  row.rms = table.number("rms");
  row.likeliest = table.integer("likeliest", 0, manifest.vocab_size - 1);
  row.margin = table.number("margin");
  row.values = numbers(table, "values", values);
  row.key_norms = numbers(table, "key_norms", layers);
  row.value_norms = numbers(table, "value_norms", layers);
  return row;
}

// Slots of layers that evict, which hold the whole prompt.
std::optional<std::int64_t> slots_of(const Table& table, const Manifest& manifest, std::int64_t prompt) {
  if (!manifest.eviction) {
    if (!table.is_null("slots")) table.fail("slots", "null, because no layer evicts");
    return std::nullopt;
  }
  const Eviction& eviction = *manifest.eviction;
  const std::int64_t minimum =
      eviction.protect_first + std::max<std::int64_t>(1, eviction.protect_recent) + 1;
  return table.integer("slots", std::max(minimum, prompt), eviction.budget);
}

}  // namespace

ReferenceOutputs parse_reference_outputs(std::string_view text, const Manifest& manifest,
                                         const std::string& path) {
  const Json json = parse_json(text, path, REBUILD);
  const Table table(json, path, REBUILD);
  const Json& number = table.value("format");
  if (!number.is_number_integer() || number != FORMAT) {
    throw bundle_error("the format of " + path + " must be supported by this version of kvexport",
                       "format " + for_message(number), "format " + std::to_string(FORMAT),
                       "update kvexport, or " + std::string(REBUILD));
  }
  const std::int64_t last_id = manifest.vocab_size - 1;
  ReferenceOutputs reference;
  reference.tokens = table.integers("prompt", 0, last_id);
  reference.prompt = static_cast<std::int64_t>(reference.tokens.size());
  const std::vector<std::int64_t> continuation = table.integers("continuation", 0, last_id);
  reference.tokens.insert(reference.tokens.end(), continuation.begin(), continuation.end());
  const auto tokens = static_cast<std::int64_t>(reference.tokens.size());
  if (reference.prompt == 0) table.fail("prompt", "at least one token id");
  if (tokens > manifest.capacity) {
    table.fail("continuation", "at most " + std::to_string(manifest.capacity) +
                                   " tokens, the bundle's capacity, with the prompt");
  }
  reference.first_row = table.integer("first_row", 0, reference.prompt - 1);
  reference.logit_indices = table.integers("logit_indices", 0, last_id);
  if (reference.logit_indices.empty()) table.fail("logit_indices", "at least one token id");
  for (const Table& row : table.tables("rows"))
    reference.rows.push_back(row_of(row, reference.logit_indices.size(), manifest));
  if (static_cast<std::int64_t>(reference.rows.size()) != tokens - reference.first_row)
    table.fail("rows", std::to_string(tokens - reference.first_row) + " rows");
  const Table tolerances = table.table("tolerances");
  reference.weights_sha256 = table.string("weights_sha256");
  reference.slots = slots_of(table, manifest, reference.prompt);
  for (const char* provider : {"cpu", "cuda", "tensorrt"}) {
    const Table by_dtype = tolerances.table(provider);
    for (const Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      const Table each = by_dtype.table(name_of(dtype));
      reference.tolerances[provider][static_cast<std::size_t>(dtype)] = {
          each.number("logits"), each.number("norms"), each.number("tie")};
    }
  }
  return reference;
}

ReferenceOutputs read_reference_outputs(const Bundle& bundle) {
  if (!bundle.manifest.has(FILE_NAME))
    throw bundle_error("the bundle " + bundle.path + " must contain " + FILE_NAME, {}, {}, REBUILD);
  const std::string path = std::string(FILE_NAME) + " of the bundle " + bundle.path;
  return parse_reference_outputs(read_file(bundle.file(FILE_NAME), LARGEST), bundle.manifest, path);
}

}  // namespace kvexport::detail
