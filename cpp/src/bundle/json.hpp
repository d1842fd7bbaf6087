// Untrusted JSON: parsing within limits, and typed access to the keys of an object. Every error names the
// key.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvexport::detail {

using Json = nlohmann::json;

// Parses a document. `document`: its name in messages; `fix`: the remedy in messages, "" for that of a
// bundle. Throws Failure ("`document` cannot be read: ...") if the text is not JSON or not UTF-8, is nested
// deeper than 64 levels, has a key twice in one object, or has a number beyond float64.
Json parse_json(std::string_view text, const std::string& document, const std::string& fix = {});

// A value as it appears in messages: ASCII, at most 80 characters.
std::string for_message(const Json& value);

// Whether a terminal can show UTF-8 text as it is: it has no control, formatting or line-breaking characters.
bool printable(std::string_view text);

// Typed access to the keys of an object. Every getter throws Failure (bundle_error) if the key is missing or
// its value has another type or range.
class Reader {
 public:
  // `document`: name in messages, e.g. "the manifest"; `where`: path of `raw` within the document, ending in
  // "."; `fix`: see parse_json. Keeps a pointer to `raw`.
  Reader(const Json& raw, std::string document, std::string where = {}, std::string fix = {});

  bool has(const std::string& key) const;  // present and not null
  const Json& value(const std::string& key) const;
  Reader object(const std::string& key) const;
  Reader entry(const std::string& key) const;                  // an object whose key is a file name
  std::string printable_string(const std::string& key) const;  // a string that passes `printable`
  std::string string(const std::string& key) const;            // any string
  std::int64_t integer(const std::string& key) const;
  std::int64_t positive_integer(const std::string& key) const;  // 1 or more
  double number(const std::string& key) const;                  // finite
  bool boolean(const std::string& key) const;
  std::optional<std::int64_t> optional_integer(const std::string& key) const;
  std::optional<std::int64_t> optional_positive_integer(const std::string& key) const;
  std::vector<Reader> objects(const std::string& key) const;  // an array of objects
  std::vector<std::int64_t> integers(const std::string& key) const;
  std::vector<double> numbers(const std::string& key) const;
  std::vector<std::string> strings(const std::string& key) const;  // an array of strings
  std::vector<std::string> keys() const;

  [[noreturn]] void fail(const std::string& key, const std::string& problem,
                         const std::string& expected = {}) const;

 private:
  const Json& array(const std::string& key) const;
  const Json* raw_;
  std::string document_, where_, fix_;
};

}  // namespace kvexport::detail
