// JSON of a bundle that nobody vouches for: parsed within limits, read key by key, and where something is
// missing or of another type, said which. Knows types and ranges, not what the keys mean.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvexport::detail {

using Json = nlohmann::json;

// Throws Failure (bundle_error, "`document` cannot be read: ..."): no JSON, not UTF-8, nested deeper than 64,
// a key twice, a number beyond float64. `fix`: "" for a bundle's.
Json parse_json(std::string_view text, const std::string& document, const std::string& fix = {});

// As a message shows it: ASCII, cut off after 80 characters.
std::string for_message(const Json& value);

// Whether a terminal can show UTF-8 text as it is: no control, formatting or line-breaking characters.
bool printable(std::string_view text);

// Takes typed values out of an object. Every one throws Failure (bundle_error) with the key where it is
// missing or otherwise.
class Reader {
 public:
  // `document`: such as "the manifest"; `where`: the path to `raw` within it, ending in ".". Keeps a pointer
  // to `raw`.
  Reader(const Json& raw, std::string document, std::string where = {}, std::string fix = {});

  bool has(const std::string& key) const;  // there, and not null
  const Json& value(const std::string& key) const;
  Reader object(const std::string& key) const;
  Reader entry(const std::string& key) const;  // a table whose key is a name of the document's own
  std::string printable_string(const std::string& key) const;  // printable
  std::string string(const std::string& key) const;  // with line ends and whatever else text may have
  std::int64_t integer(const std::string& key) const;
  std::int64_t positive_integer(const std::string& key) const;  // 1 or more
  double number(const std::string& key) const;                  // finite
  bool boolean(const std::string& key) const;
  std::optional<std::int64_t> optional_integer(const std::string& key) const;
  std::optional<std::int64_t> optional_positive_integer(const std::string& key) const;
  std::vector<Reader> objects(const std::string& key) const;  // of objects
  std::vector<std::int64_t> integers(const std::string& key) const;
  std::vector<double> numbers(const std::string& key) const;
  std::vector<std::string> strings(const std::string& key) const;  // as any_text
  std::vector<std::string> keys() const;

  [[noreturn]] void fail(const std::string& key, const std::string& problem,
                         const std::string& expected = {}) const;

 private:
  const Json& array(const std::string& key) const;
  const Json* raw_;
  std::string document_, where_, fix_;
};

}  // namespace kvexport::detail
