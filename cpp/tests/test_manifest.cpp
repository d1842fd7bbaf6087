// Manifests are accepted or refused as by Python, with the same message, and damage is always detected.
#include <nlohmann/json.hpp>
#include <random>

#include "bundle/error.hpp"
#include "bundle/json.hpp"
#include "bundle/manifest.hpp"
#include "check.hpp"
#include "files.hpp"

using namespace kvexport::detail;

namespace {

std::string valid_manifest() { return contents(check::reader_file("tiny/manifest.json")); }

std::string result_of(const std::string& manifest, const std::string& where) {
  try {
    parse_manifest(manifest, where);
  } catch (const Failure& failure) {
    return failure.failed;
  }
  return "accepted";
}

// Removes the parser's own text, which differs between the languages.
std::string comparable(std::string text) {
  const std::string mark = " must be JSON";
  if (const std::size_t at = text.find(mark); at != std::string::npos) text.resize(at + mark.size());
  return text;
}

}  // namespace

TEST(reads_manifests_of_python) {
  const Manifest manifest = parse_manifest(valid_manifest(), "tiny");
  CHECK_EQUAL(manifest.source_name, "tiny");
  CHECK_EQUAL(manifest.version, KVEXPORT_VERSION);
  CHECK_EQUAL(manifest.digest.size(), 64U);
  CHECK_EQUAL(manifest.vocab_size, 40);
  CHECK_EQUAL(manifest.hidden_size, 32);
  CHECK_EQUAL(manifest.max_position_embeddings.value(), 256);
  CHECK_EQUAL(manifest.bos_token_id.value(), 1);
  CHECK(manifest.eos_token_ids == std::vector<std::int64_t>{2});
  CHECK(manifest.dtype == Dtype::float32 && !manifest.eviction);
  CHECK_EQUAL(manifest.capacity, 64);
  CHECK_EQUAL(manifest.layers.size(), 2U);
  CHECK_EQUAL(manifest.layers[1].num_key_value_heads, 2);
  CHECK_EQUAL(manifest.layers[1].key_head_dim, 8);
  CHECK(manifest.has("decoder.onnx.data") && manifest.has("tokenizer.json") &&
        !manifest.has("manifest.json"));
}

TEST(reads_eviction) {
  const Manifest manifest =
      parse_manifest(contents(check::reader_file("evicting/manifest.json")), "evicting");
  const Eviction& eviction = manifest.eviction.value();
  CHECK_EQUAL(eviction.policy, "l2-norm");
  CHECK(manifest.evicts(0) && !manifest.evicts(1));
  CHECK_EQUAL(eviction.chunk(), 5);
  CHECK_EQUAL(eviction.self_test_slots(), 23);
}

TEST(layers_with_a_window_below_the_capacity_are_rings) {
  Manifest manifest = parse_manifest(contents(check::reader_file("windowed/manifest.json")), "windowed");
  CHECK_EQUAL(manifest.layers[0].window.value(), 5);
  CHECK(manifest.ring_of(0) == 5 && manifest.ring_of(1) == 5);
  manifest.layers[1].window = manifest.capacity;
  CHECK(!manifest.ring_of(1));
}

TEST(messages_equal_those_of_python) {
  std::size_t cases = 0, accepted = 0;
  for (const auto& entry : std::filesystem::directory_iterator(check::reader_file("manifests"))) {
    const std::string name = entry.path().filename().string(), folder = entry.path().string();
    const std::string python = contents(folder + "/message.txt"),
                      cpp = result_of(contents(folder + "/manifest.json"), "BUNDLE");
    ++cases, accepted += cpp == "accepted";
    if (comparable(cpp) != comparable(python))
      check::fail(__FILE__, __LINE__, name + "\n C++:    " + cpp + "\n Python: " + python);
  }
  CHECK(cases > 1000 && accepted > 50 && accepted < cases / 2);
}

TEST(detects_every_changed_bit) {
  const std::string whole = valid_manifest();
  std::mt19937 random(0);
  for (int i = 0; i < 2000; ++i) {
    std::string spoiled = whole;
    spoiled[random() % whole.size()] ^= static_cast<char>(1 << random() % 8);
    CHECK(result_of(spoiled, "BUNDLE") != "accepted");
  }
}

TEST(detects_every_truncation) {
  const std::string whole = valid_manifest();
  for (std::size_t size = 0; size + 2 < whole.size(); size += 7)
    CHECK(result_of(whole.substr(0, size), "BUNDLE") != "accepted");
}

TEST(failures_have_a_fix) {
  CHECK_THROWS_WITH(parse_manifest(R"({"format": 1})", "b"), "build the bundle again: kvexport build");
  CHECK_THROWS_WITH(parse_manifest(R"({"format": 4, "kvexport": "9.0"})", "b"),
                    "written by kvexport \"9.0\"");
  CHECK_THROWS_WITH(parse_manifest(R"({"format": 4, "kvexport": "9.0"})", "b"), "update kvexport");
  CHECK_THROWS_WITH(parse_manifest(R"({"format": 3, "files": {}})", "b"), "its sha256 differs");
}

TEST(refuses_duplicate_keys) {
  std::string twice = valid_manifest();
  twice.insert(twice.find('{') + 1, "\"format\": 3, ");
  CHECK_THROWS_WITH(parse_manifest(twice, "b"), "a duplicate key: \"format\"");
  CHECK_THROWS_WITH(parse_json(R"({"a": {"b": 1, "b": 2}})", "x"), "a duplicate key: \"b\"");
  CHECK_EQUAL(parse_json(R"([{"a": 1}, {"a": {"a": 2}}])", "x").size(), 2U);
}

TEST(refuses_deep_nesting) {
  const auto nested = [](std::size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  parse_json(nested(64), "x");
  CHECK_THROWS_WITH(parse_json(nested(65), "x"), "nested deeper than 64");
  CHECK_THROWS_WITH(parse_json(std::string(1 << 20, '['), "x"), "x must be JSON");
  std::string objects;
  for (int i = 0; i < 100; ++i) objects += "{\"a\":";
  CHECK_THROWS_WITH(parse_json(objects, "x"), "nested deeper than 64");
}

TEST(refuses_invalid_json) {
  for (const char* text :
       {"", "NaN", "[Infinity]", "{\"a\": 1e999}", "[1,]", "// a\n1", "\"\xC3\"", "\"\xED\xA0\x80\"", "1 2"})
    CHECK_THROWS_WITH(parse_json(text, "x"), "x must be JSON");
}

TEST(values_in_messages_are_short_ascii) {
  CHECK_EQUAL(for_message("\x1b[31m\xC3\xA9"), "\"\\u001b[31m\\u00e9\"");
  CHECK_EQUAL(for_message(std::string(1000, 'x')).size(), 80U);
  CHECK(printable("caf\xC3\xA9 \xE6\x97\xA5 \xF0\x9F\x99\x82") && printable(""));
  for (const char* text :
       {"\x1b[31m", "a\nb", "\x7F", "\xC2\x85", "\xE2\x80\xAE", "\xE2\x80\xA8", "\xEF\xBB\xBF"})
    CHECK(!printable(text));
}

TEST(refuses_sizes_beyond_any_memory) {
  for (const char* name : {"heads", "width", "capacity", "layers", "vocabulary"}) {
    const std::string harmful = contents(check::reader_file("harmful") + "/" + name + ".json");
    CHECK_THROWS_WITH(parse_manifest(harmful, "b"), "must fit in the memory of a machine");
  }
}
