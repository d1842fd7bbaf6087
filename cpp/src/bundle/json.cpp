#include "bundle/json.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <utility>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {

constexpr int deepest = 64;

// Callback of the JSON parser. It throws at the first violation, so that a hostile document is not built in
// memory.
class ParseLimits {
 public:
  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start) {
      if (depth >= deepest) throw std::length_error("it is nested deeper than " + std::to_string(deepest));
      if (event == Json::parse_event_t::object_start) keys_.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys_.pop_back();
    } else if (event == Json::parse_event_t::key) {
      if (!keys_.back().insert(parsed.get_ref<const std::string&>()).second)
        throw std::invalid_argument("it has a duplicate key: " + for_message(parsed));
    }
    return true;
  }

 private:
  std::vector<std::set<std::string>> keys_;  // keys of the objects that are open
};

// Decodes one code point of valid UTF-8 and advances `at` behind it.
char32_t next_character(std::string_view text, std::size_t& at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(i < text.size() ? text[i] : 0); };
  const unsigned char first = byte(at);
  const std::size_t more = first < 0x80 ? 0 : first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
  char32_t character = more == 0 ? first : first & (0x3FU >> more);
  for (std::size_t i = 1; i <= more; ++i) character = character << 6 | (byte(at + i) & 0x3FU);
  at += more + 1;
  return character;
}

bool is_integer(const Json& value) {
  return value.is_number_integer() &&
         (!value.is_number_unsigned() ||
          value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()});
}

bool is_between(std::int64_t value, Table::Limit minimum, Table::Limit maximum) {
  return (!minimum || value >= *minimum) && (!maximum || value <= *maximum);
}

bool is_printable_string(const Json& value) {
  return value.is_string() && printable(value.get_ref<const std::string&>());
}

// The allowed range in words.
std::string range(const std::string& kind, Table::Limit minimum, Table::Limit maximum) {
  if (minimum && maximum)
    return kind + " from " + std::to_string(*minimum) + " to " + std::to_string(*maximum);
  if (minimum) return kind + " >= " + std::to_string(*minimum);
  return maximum ? kind + " <= " + std::to_string(*maximum) : kind;
}

std::string joined(std::initializer_list<const char*> parts) {
  std::string text;
  for (const char* part : parts) text += (text.empty() ? "" : ", ") + std::string(part);
  return text;
}

const Json& null_value() {
  static const Json null;
  return null;
}

}  // namespace

Json parse_json(std::string_view text, const std::string& path, const std::string& fix) {
  try {
    if (text.find('\0') != std::string_view::npos)
      throw std::invalid_argument("it contains a NUL byte");  // the parser would stop there
    return Json::parse(text.begin(), text.end(), ParseLimits());
  } catch (const std::exception& error) {
    throw bundle_error(path + " must be JSON: " + error.what(), {}, {}, fix);
  }
}

std::string for_message(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > 80) text.resize(80);
  return text;
}

bool printable(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const char32_t c = next_character(text, at);
    const bool formats = c == 0xAD || (c >= 0x200B && c <= 0x200F) || (c >= 0x2028 && c <= 0x202E) ||
                         (c >= 0x2060 && c <= 0x206F) || c == 0xFEFF || (c >= 0xFFF9 && c <= 0xFFFB) ||
                         c >= 0xE0000;
    if (c < 0x20 || (c >= 0x7F && c <= 0xA0) || formats) return false;
  }
  return true;
}

Table::Table(const Json& raw, std::string path, std::string fix)
    : path(std::move(path)), raw_(&raw), fix_(std::move(fix)) {
  if (!raw.is_object()) fail_value(this->path + " must be a table", raw, "a table");
}

bool Table::contains(const std::string& key) const { return raw_->contains(key); }

bool Table::has(const std::string& key) const { return !value(key).is_null(); }

bool Table::is_null(const std::string& key) const {
  if (!contains(key)) fail(key, "a value or null");
  return raw_->at(key).is_null();
}

const Json& Table::value(const std::string& key) const {
  const auto item = raw_->find(key);
  return item == raw_->end() ? null_value() : *item;
}

std::int64_t Table::integer(const std::string& key, Limit minimum, Limit maximum) const {
  const Json& item = value(key);
  if (!is_integer(item) || !is_between(item.get<std::int64_t>(), minimum, maximum))
    fail(key, range("an integer", minimum, maximum));
  return item.get<std::int64_t>();
}

std::optional<std::int64_t> Table::optional_integer(const std::string& key, Limit minimum,
                                                    Limit maximum) const {
  return has(key) ? std::optional(integer(key, minimum, maximum)) : std::nullopt;
}

double Table::number(const std::string& key, std::optional<double> minimum) const {
  const Json& item = value(key);
  const double number = item.is_number() ? item.get<double>() : std::nan("");
  if (!std::isfinite(number) || (minimum && number < *minimum)) {
    std::ostringstream limit;
    if (minimum) limit << " >= " << *minimum;
    fail(key, "a finite number" + limit.str());
  }
  return number;
}

std::string Table::string(const std::string& key) const {
  const Json& item = value(key);
  if (!is_printable_string(item)) fail(key, "printable text");
  return item.get<std::string>();
}

std::string Table::string(const std::string& key, std::initializer_list<const char*> choices) const {
  const Json& item = value(key);
  if (!item.is_string() ||
      std::find(choices.begin(), choices.end(), item.get<std::string>()) == choices.end())
    fail(key, joined(choices));
  return item.get<std::string>();
}

std::string Table::text(const std::string& key) const {
  const Json& item = value(key);
  if (!item.is_string()) fail(key, "a string of valid Unicode");
  return item.get<std::string>();
}

bool Table::boolean(const std::string& key) const {
  const Json& item = value(key);
  if (!item.is_boolean()) fail(key, "true or false");
  return item.get<bool>();
}

Table Table::table(const std::string& key) const { return {value(key), where(key), fix_}; }

std::vector<Table> Table::tables(const std::string& key) const {
  std::vector<Table> tables;
  for (const Json& item : list(key))
    tables.emplace_back(item, where(key) + "[" + std::to_string(tables.size()) + "]", fix_);
  return tables;
}

const Json& Table::list(const std::string& key) const {
  const Json& item = value(key);
  if (!item.is_array()) fail(key, "a list");
  return item;
}

template <typename Valid>
const Json& Table::items(const std::string& key, const std::string& expected, Valid valid) const {
  const Json& item = value(key);
  if (!item.is_array()) fail(key, "a list of " + expected);
  for (std::size_t index = 0; index < item.size(); ++index) {
    if (!valid(item[index])) {
      fail_value(where(key) + "[" + std::to_string(index) + "] has an invalid value", item[index],
                 "a list of " + expected);
    }
  }
  return item;
}

std::vector<std::int64_t> Table::integers(const std::string& key, Limit minimum, Limit maximum) const {
  const auto valid = [&](const Json& item) {
    return is_integer(item) && is_between(item.get<std::int64_t>(), minimum, maximum);
  };
  return items(key, range("integers", minimum, maximum), valid).get<std::vector<std::int64_t>>();
}

std::vector<double> Table::numbers(const std::string& key) const {
  const auto valid = [](const Json& item) { return item.is_number() && std::isfinite(item.get<double>()); };
  return items(key, "finite numbers", valid).get<std::vector<double>>();
}

std::vector<std::string> Table::strings(const std::string& key) const {
  return items(key, "printable strings", is_printable_string).get<std::vector<std::string>>();
}

std::vector<std::string> Table::texts(const std::string& key) const {
  const auto valid = [](const Json& item) { return item.is_string(); };
  return items(key, "strings of valid Unicode", valid).get<std::vector<std::string>>();
}

std::vector<std::string> Table::keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : raw_->items()) keys.push_back(key);
  return keys;
}

void Table::only(std::initializer_list<const char*> allowed) const {
  for (const std::string& key : keys()) {
    if (std::find(allowed.begin(), allowed.end(), key) == allowed.end())
      fail_value(path + " has an unknown key", key, joined(allowed));
  }
}

void Table::fail(const std::string& key, const std::string& expected) const {
  if (!has(key)) throw bundle_error(where(key) + " is missing", {}, expected, fix_);
  fail_value(where(key) + " has an invalid value", value(key), expected);
}

std::string Table::where(const std::string& key) const {
  return path + (path.find(": ") == std::string::npos ? ": " : ".") +
         (printable(key) ? key : for_message(key));
}

void Table::fail_value(const std::string& failed, const Json& value, const std::string& expected) const {
  throw bundle_error(failed, for_message(value), expected, fix_);
}

}  // namespace kvexport::detail
