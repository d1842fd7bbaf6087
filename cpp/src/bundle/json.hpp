// Untrusted JSON: parsing within limits, and typed access to the keys of an object, with the messages of
// kvexport/files/schema.py. Every error names the file and the key.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvexport::detail {

using Json = nlohmann::json;

// Parses a document. `path`: its name in messages; `fix`: how to fix it, "" for that of a bundle. Throws
// Failure
// ("`path` must be JSON: ...") if the text is not JSON or not UTF-8, is nested deeper than 64 levels, has a
// key twice in one object, or has a number beyond float64.
Json parse_json(std::string_view text, const std::string& path, const std::string& fix = {});

// A value as it appears in messages: printable, at most 80 characters.
std::string for_message(const Json& value);

// Whether a terminal can show UTF-8 text as it is: it has no control, formatting or line-breaking characters.
bool printable(std::string_view text);

// An object of a JSON document, read key by key. A key that is absent or null is missing: call `has` first if
// a key is optional, `is_null` if it may be null but must be present. Every method throws Failure
// (bundle_error) if the key is missing, or its value has another type or range.
class Table {
 public:
  // `path`: where the object is, e.g. "manifest.json: layers[2]"; `fix`: see parse_json. Keeps a pointer to
  // `raw`. Throws Failure if `raw` is not an object.
  Table(const Json& raw, std::string path, std::string fix = {});

  using Limit = std::optional<std::int64_t>;

  bool contains(const std::string& key) const;  // present, possibly null
  bool has(const std::string& key) const;       // present and not null
  bool is_null(const std::string& key) const;   // null; throws if the key is absent
  const Json& value(const std::string& key) const;
  std::int64_t integer(const std::string& key, Limit minimum = {}, Limit maximum = {}) const;
  std::optional<std::int64_t> optional_integer(const std::string& key, Limit minimum = {},
                                               Limit maximum = {}) const;
  double number(const std::string& key, std::optional<double> minimum = {}) const;  // finite
  std::string string(const std::string& key) const;                                 // printable
  std::string string(const std::string& key, std::initializer_list<const char*> choices) const;
  std::string text(const std::string& key) const;  // any characters
  bool boolean(const std::string& key) const;
  Table table(const std::string& key) const;
  std::vector<Table> tables(const std::string& key) const;
  const Json& list(const std::string& key) const;
  std::vector<std::int64_t> integers(const std::string& key, Limit minimum = {}, Limit maximum = {}) const;
  std::vector<double> numbers(const std::string& key) const;
  std::vector<std::string> strings(const std::string& key) const;  // printable
  std::vector<std::string> texts(const std::string& key) const;
  std::vector<std::string> keys() const;

  // Throws Failure if there is a key that is not in `allowed`.
  void only(std::initializer_list<const char*> allowed) const;
  // Throws the Failure for a key whose value is missing or invalid.
  [[noreturn]] void fail(const std::string& key, const std::string& expected) const;

  const std::string path;

 private:
  template <typename Valid>
  const Json& items(const std::string& key, const std::string& expected, Valid valid) const;
  std::string where(const std::string& key) const;
  [[noreturn]] void fail_value(const std::string& failed, const Json& value,
                               const std::string& expected) const;
  const Json* raw_;
  std::string fix_;
};

}  // namespace kvexport::detail
