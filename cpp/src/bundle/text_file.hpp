// A bundle's text.json as typed data: tokenizer samples and chat strings, recorded at build time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/chat.hpp"

namespace kvexport::detail {

// A text, its token ids with and without the tokenizer's special tokens, and the ids decoded without them.
struct TokenizerSample {
  std::string text;
  std::vector<std::int64_t> ids, plain_ids;
  std::string decoded;
};

struct TextFile {
  std::vector<TokenizerSample> samples;     // at least one
  std::vector<std::int64_t> special_ids;    // tokens that decoding omits, ascending
  std::vector<std::int64_t> before, after;  // special tokens around every text
  std::optional<Chat> chat;
};

inline constexpr const char* text_file = "text.json";

// Parses the content of text.json. `path`: its name in messages. Throws Failure (bundle_error) if a value is
// missing, has another type or range, or contradicts another one, and if the chat strings do not produce the
// text of the file's own conversations.
TextFile parse_text(std::string_view text, const std::string& path = text_file);

}  // namespace kvexport::detail
