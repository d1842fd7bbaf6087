// text.json of a bundle: what its tokenizer and chat template gave when it was built, as typed data. Read
// from its bytes and checked; knows no tokenizer.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/chat.hpp"

namespace kvexport::detail {

// A text, its token ids with and without the tokenizer's special tokens around it, and those decoded without
// them.
struct TokenizerSample {
  std::string text;
  std::vector<std::int64_t> ids, plain_ids;
  std::string decoded;
};

struct TextFile {
  std::vector<TokenizerSample> samples;     // at least one
  std::vector<std::int64_t> special_ids;    // tokens that decoding leaves out; ascending
  std::vector<std::int64_t> before, after;  // the special tokens that are put around every text
  std::optional<Chat> chat;
};

inline constexpr const char* text_file = "text.json";

// Throws Failure (bundle_error): a value is missing, of another type or range, or contradicts another; so
// where the chat's strings do not give the text of the conversations that the file holds.
TextFile parse_text(std::string_view text);

}  // namespace kvexport::detail
