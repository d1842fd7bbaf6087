#include "text/text.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "bundle/error.hpp"
#include "bundle/json.hpp"

namespace kvexport::detail {
namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::string_view incomplete = "\ufffd";  // decoding of an incomplete character
constexpr std::string_view space_mark = "\u2581";  // of sentencepiece
constexpr std::size_t context = 8;  // tokens before the new ones that decoding needs for correct spaces
constexpr std::size_t longest = 4;  // tokens per character, if each token is one byte

template <typename List>
List rest(typename List::const_iterator from, const List& list) {
  return List(from, list.end());
}

std::string complete_part(std::string text) {
  while (text.size() >= incomplete.size() &&
         std::string_view(text).substr(text.size() - incomplete.size()) == incomplete)
    text.resize(text.size() - incomplete.size());
  return text;
}

// The text behind the first `bytes` bytes; if they end within a character, the text behind that character.
std::string after(const std::string& text, std::size_t bytes) {
  while (bytes < text.size() && (static_cast<unsigned char>(text[bytes]) & 0xc0) == 0x80) ++bytes;
  return bytes < text.size() ? text.substr(bytes) : std::string();
}

}  // namespace

Text::Text(const std::string& folder, TextFile file, const std::string& library)
    : file_(std::move(file)), tokenizer_(folder, library) {
  const TokenizerSample& first = file_.samples[0];
  drops_space_ = without_special(first.ids) == " " + first.decoded;
  adds_space_ = tokenizer_.encode(first.text) != first.plain_ids &&
                tokenizer_.encode(" " + first.text) == first.plain_ids;
  require_samples();
}

void Text::require_samples() const {
  const auto refuse = [](const TokenizerSample& one, const auto& actual, const auto& expected) {
    const auto pair = std::mismatch(actual.begin(), actual.end(), expected.begin(), expected.end());
    throw Failure(
        Code::cannot_run_here,
        "onnxruntime-genai must give the same tokens as the tokenizer that the bundle was built with",
        "after " + std::to_string(pair.first - actual.begin()) + " that agree, " +
            for_message(rest(pair.first, actual)),
        for_message(rest(pair.second, expected)) + ", for the text " + for_message(one.text),
        "use token ids from the Python package or another tokenizer, or another version of "
        "onnxruntime-genai");
  };
  for (const TokenizerSample& one : file_.samples) {
    if (const Ids ids = encode(one.text, false); ids != one.plain_ids) refuse(one, ids, one.plain_ids);
    if (const std::string text = decode(one.ids); text != one.decoded) refuse(one, text, one.decoded);
  }
}

bool Text::is_special(std::int64_t id) const {
  return std::binary_search(file_.special_ids.begin(), file_.special_ids.end(), id);
}

Ids Text::encode(const std::string& text, bool special) const {
  Ids ids = tokenizer_.encode(text);
  const bool spaced = text.compare(0, 1, " ") == 0 || text.compare(0, space_mark.size(), space_mark) == 0;
  if (adds_space_ && !ids.empty() && !spaced && !is_special(ids[0])) ids = tokenizer_.encode(" " + text);
  if (special) {
    ids.insert(ids.begin(), file_.before.begin(), file_.before.end());
    ids.insert(ids.end(), file_.after.begin(), file_.after.end());
  }
  return ids;
}

std::string Text::without_special(Ids ids) const {
  ids.erase(std::remove_if(ids.begin(), ids.end(), [this](std::int64_t id) { return is_special(id); }),
            ids.end());
  return tokenizer_.decode(ids);
}

std::string Text::decode(const Ids& ids) const {
  std::string text = decoded(ids);
  if (complete_part(text) == text) return text;
  TextStream stream(*this, {});  // handles invalid bytes
  text.clear();
  for (const std::int64_t id : ids) text += stream.add(id);
  return text + stream.end();
}

std::string Text::decoded(const Ids& ids) const {
  std::string text = without_special(ids);
  return drops_space_ && text.compare(0, 1, " ") == 0 ? text.substr(1) : text;
}

Ids Text::turn(const std::string& text, const std::optional<std::string>& system, bool begins) const {
  if (file_.chat) return encode(file_.chat->turn(text, system, begins), false);
  if (system)
    throw Failure(Code::usage, "a system prompt requires a chat template, which the bundle does not have", "",
                  "", "put it at the start of the text");
  return encode(text, begins);
}

TextStream::TextStream(const Text& text, const Ids& prompt) : text_(&text) {
  const std::size_t first = prompt.size() > context ? prompt.size() - context : 0;
  for (std::size_t back = 0; back < longest && back <= first; ++back) {
    ids_.assign(prompt.begin() + static_cast<std::ptrdiff_t>(first - back), prompt.end());
    const std::string decoded = text_->decoded(ids_);
    output_ = complete_part(decoded);
    if (decoded.compare(0, incomplete.size(), incomplete) != 0) break;
  }
  output_tokens_ = ids_.size();
}

std::string TextStream::add(std::int64_t token) {
  if (text_->is_special(token)) return {};
  ids_.push_back(token);
  const std::string piece = grow();
  return ids_.size() - output_tokens_ <= longest ? piece : piece + skip();
}

std::string TextStream::end() {
  std::string piece;
  while (ids_.size() - output_tokens_ > 1) piece += skip();
  return ids_.size() == output_tokens_ ? piece : piece + after(text_->decoded(ids_), output_.size());
}

// Skips an invalid byte: the tokenizer decodes nothing after it, so decoding restarts behind it.
std::string TextStream::skip() {
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(output_tokens_) + 1);
  output_.clear();
  boundary_ = output_tokens_ = 0;
  return std::string(incomplete) + grow();
}

std::string TextStream::grow() {
  const std::string text = text_->decoded(ids_), complete = complete_part(text);
  if (complete == text) output_tokens_ = ids_.size();
  if (complete.size() <= output_.size()) return {};
  const std::string piece = after(complete, output_.size());
  output_ = complete;
  output_tokens_ = std::max(output_tokens_, ids_.size() - 1);
  if (complete == text) forget();
  return piece;
}

// Called at the end of a character. Drops tokens that are no longer needed as context.
void TextStream::forget() {
  if (ids_.size() - boundary_ >= context) {
    ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(boundary_));
    output_ = text_->decoded(ids_);
    boundary_ = output_tokens_ = ids_.size();
  } else if (boundary_ == 0) {
    boundary_ = ids_.size();
  }
}

}  // namespace kvexport::detail
