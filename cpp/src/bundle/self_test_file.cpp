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

std::vector<std::int64_t> ids(const Reader& raw, const char* key, std::int64_t vocab_size) {
  std::vector<std::int64_t> values = raw.integers(key);
  const bool within =
      std::all_of(values.begin(), values.end(), [&](std::int64_t id) { return id >= 0 && id < vocab_size; });
  if (!within) raw.fail(key, "is not token ids", "0 to " + std::to_string(vocab_size - 1));
  return values;
}

std::vector<double> numbers(const Reader& raw, const char* key, std::size_t count) {
  std::vector<double> values = raw.numbers(key);
  if (values.size() != count) raw.fail(key, "has another length", std::to_string(count) + " numbers");
  return values;
}

Row row_of(const Reader& raw, std::size_t values, const Manifest& manifest) {
  const std::size_t layers = manifest.layers.size();
  Row row;
  row.rms = raw.number("rms"), row.margin = raw.number("margin"), row.likeliest = raw.integer("likeliest");
  if (row.likeliest < 0 || row.likeliest >= manifest.vocab_size) raw.fail("likeliest", "is no token id");
  row.values = numbers(raw, "values", values);
  row.key_norms = numbers(raw, "key_norms", layers), row.value_norms = numbers(raw, "value_norms", layers);
  return row;
}

std::optional<std::int64_t> slots_of(const Reader& raw, const Manifest& manifest) {
  (void)raw.value("slots");  // the key must be present, null included
  const std::optional<std::int64_t> slots = raw.optional_integer("slots");
  if (slots.has_value() != manifest.eviction.has_value())
    raw.fail("slots", "contradicts the manifest's eviction");
  if (!slots) return slots;
  const Eviction& eviction = *manifest.eviction;
  const std::int64_t minimum =
      eviction.protect_first + std::max<std::int64_t>(1, eviction.protect_recent) + 1;
  if (*slots < minimum || *slots > eviction.budget) {
    raw.fail("slots", "is out of range", std::to_string(minimum) + " to " + std::to_string(eviction.budget));
  }
  return slots;
}

}  // namespace

ReferenceOutputs parse_reference_outputs(std::string_view text, const Manifest& manifest,
                                         const std::string& document) {
  const Json json = parse_json(text, document, REBUILD);
  const Reader raw(json, document, {}, REBUILD);
  if (raw.integer("format") != FORMAT) {
    throw bundle_error(document + " is of a format that this version of kvexport does not read",
                       "format " + std::to_string(raw.integer("format")), "format " + std::to_string(FORMAT),
                       "update kvexport, or " + std::string(REBUILD));
  }
  ReferenceOutputs reference;
  reference.weights_sha256 = raw.printable_string("weights_sha256");
  reference.tokens = ids(raw, "prompt", manifest.vocab_size);
  reference.prompt = static_cast<std::int64_t>(reference.tokens.size());
  if (reference.tokens.empty()) raw.fail("prompt", "is empty");
  const std::vector<std::int64_t> continuation = ids(raw, "continuation", manifest.vocab_size);
  reference.tokens.insert(reference.tokens.end(), continuation.begin(), continuation.end());
  const auto tokens = static_cast<std::int64_t>(reference.tokens.size());
  if (tokens > manifest.capacity) {
    raw.fail("continuation", "makes more tokens than the capacity",
             std::to_string(manifest.capacity) + " with the prompt");
  }
  reference.first_row = raw.integer("first_row");
  if (reference.first_row < 0 || reference.first_row >= reference.prompt)
    raw.fail("first_row", "is no row of the prompt");
  reference.logit_indices = ids(raw, "logit_indices", manifest.vocab_size);
  if (reference.logit_indices.empty()) raw.fail("logit_indices", "is empty");
  reference.slots = slots_of(raw, manifest);
  if (reference.slots && reference.prompt > *reference.slots) raw.fail("prompt", "is longer than the slots");
  for (const Reader& each : raw.objects("rows"))
    reference.rows.push_back(row_of(each, reference.logit_indices.size(), manifest));
  if (static_cast<std::int64_t>(reference.rows.size()) != tokens - reference.first_row) {
    raw.fail("rows", "has another length", std::to_string(tokens - reference.first_row) + " rows");
  }
  const Reader tolerances = raw.object("tolerances");
  for (const char* provider : {"cpu", "cuda", "tensorrt"}) {
    const Reader of_provider = tolerances.object(provider);
    for (const Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      const Reader each = of_provider.object(name_of(dtype));
      reference.tolerances[provider][static_cast<std::size_t>(dtype)] = {
          each.number("logits"), each.number("norms"), each.number("tie")};
    }
  }
  return reference;
}

ReferenceOutputs read_reference_outputs(const Bundle& bundle) {
  if (!bundle.manifest.has(FILE_NAME)) {
    throw bundle_error("the bundle " + bundle.path + " has no " + FILE_NAME, {}, {}, REBUILD);
  }
  return parse_reference_outputs(read_file(bundle.file(FILE_NAME), LARGEST), bundle.manifest,
                                 bundle.file(FILE_NAME));
}

}  // namespace kvexport::detail
