#include "bundle/json.hpp"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {

constexpr int deepest = 64;
constexpr const char* wrong_type = "is missing or of the wrong type";

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

// A key, escaped if a terminal could not show it.
std::string key_for_message(const std::string& key) { return printable(key) ? key : for_message(Json(key)); }

bool is_integer(const Json& value) {
  return value.is_number_integer() &&
         (!value.is_number_unsigned() ||
          value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()});
}

}  // namespace

Json parse_json(std::string_view text, const std::string& document, const std::string& fix) {
  try {
    if (text.find('\0') != std::string_view::npos)
      throw std::invalid_argument("it contains a NUL byte");  // the parser would take it for the end
    return Json::parse(text.begin(), text.end(), ParseLimits());
  } catch (const std::exception& error) {
    throw bundle_error(document + " cannot be read: " + error.what(), {}, {}, fix);
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

Reader::Reader(const Json& raw, std::string document, std::string where, std::string fix)
    : raw_(&raw), document_(std::move(document)), where_(std::move(where)), fix_(std::move(fix)) {
  if (raw.is_object()) return;
  const std::string at = where_.empty() ? document_ : document_ + "'s " + where_.substr(0, where_.size() - 1);
  throw bundle_error(at + " is not an object", for_message(raw), {}, fix_);
}

bool Reader::has(const std::string& key) const {
  const auto item = raw_->find(key);
  return item != raw_->end() && !item->is_null();
}

const Json& Reader::value(const std::string& key) const {
  const auto item = raw_->find(key);
  if (item == raw_->end()) fail(key, wrong_type);
  return *item;
}

Reader Reader::object(const std::string& key) const {
  static const Json none;
  const auto item = raw_->find(key);
  return {item == raw_->end() ? none : *item, document_, where_ + key_for_message(key) + ".", fix_};
}

Reader Reader::entry(const std::string& key) const {
  return {
      value(key), document_,
      (where_.empty() ? where_ : where_.substr(0, where_.size() - 1)) + "['" + key_for_message(key) + "'].",
      fix_};
}

std::string Reader::string(const std::string& key) const {
  const Json& item = value(key);
  if (!item.is_string()) fail(key, wrong_type);
  return item.get<std::string>();
}

std::string Reader::printable_string(const std::string& key) const {
  std::string item = string(key);
  if (!printable(item)) fail(key, "has characters that cannot be shown");
  return item;
}

std::int64_t Reader::integer(const std::string& key) const {
  const Json& item = value(key);
  if (!is_integer(item)) fail(key, wrong_type);
  return item.get<std::int64_t>();
}

std::int64_t Reader::positive_integer(const std::string& key) const {
  const std::int64_t item = integer(key);
  if (item < 1) fail(key, "is impossible", "1 or more");
  return item;
}

double Reader::number(const std::string& key) const {
  const Json& item = value(key);
  if (!item.is_number()) fail(key, wrong_type);
  const double value = item.get<double>();
  if (!std::isfinite(value)) fail(key, "is impossible", "a finite number");
  return value;
}

bool Reader::boolean(const std::string& key) const {
  const Json& item = value(key);
  if (!item.is_boolean()) fail(key, wrong_type);
  return item.get<bool>();
}

std::optional<std::int64_t> Reader::optional_integer(const std::string& key) const {
  return has(key) ? std::optional(integer(key)) : std::nullopt;
}

std::optional<std::int64_t> Reader::optional_positive_integer(const std::string& key) const {
  return has(key) ? std::optional(positive_integer(key)) : std::nullopt;
}

const Json& Reader::array(const std::string& key) const {
  const Json& item = value(key);
  if (!item.is_array()) fail(key, wrong_type);
  return item;
}

std::vector<Reader> Reader::objects(const std::string& key) const {
  std::vector<Reader> items;
  for (const Json& item : array(key)) {
    if (!item.is_object()) fail(key, "is not a list of objects");
    items.emplace_back(item, document_, where_ + key + "[" + std::to_string(items.size()) + "].", fix_);
  }
  return items;
}

std::vector<std::int64_t> Reader::integers(const std::string& key) const {
  std::vector<std::int64_t> items;
  for (const Json& item : array(key)) {
    if (!is_integer(item)) fail(key, "is not a list of whole numbers");
    items.push_back(item.get<std::int64_t>());
  }
  return items;
}

std::vector<double> Reader::numbers(const std::string& key) const {
  std::vector<double> items;
  for (const Json& item : array(key)) {
    if (!item.is_number() || !std::isfinite(item.get<double>())) fail(key, "is not a list of finite numbers");
    items.push_back(item.get<double>());
  }
  return items;
}

std::vector<std::string> Reader::strings(const std::string& key) const {
  std::vector<std::string> items;
  for (const Json& item : array(key)) {
    if (!item.is_string()) fail(key, "is not a list of texts");
    items.push_back(item.get<std::string>());
  }
  return items;
}

std::vector<std::string> Reader::keys() const {
  std::vector<std::string> items;
  for (const auto& [key, value] : raw_->items()) items.push_back(key);
  return items;
}

void Reader::fail(const std::string& key, const std::string& problem, const std::string& expected) const {
  const auto item = raw_->find(key);
  throw bundle_error(document_ + "'s " + where_ + key_for_message(key) + " " + problem,
                     item == raw_->end() ? "nothing" : for_message(*item), expected, fix_);
}

}  // namespace kvexport::detail
