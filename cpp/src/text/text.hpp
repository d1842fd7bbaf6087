// Text to token ids, and token ids to text as they come: a bundle's tokenizer, proved against what it gave
// when the bundle was built, and its chat. Knows text.json and a tokenizer; knows no model.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bundle/text_file.hpp"
#include "text/chat.hpp"
#include "text/genai.hpp"

namespace kvexport::detail {

class Text {
 public:
  // `folder`: the bundle's, whose text.json was read into `file`. `library`: libonnxruntime-genai, by name or
  // path. Throws Failure (cannot_run_here): the library is missing, or gives other ids or other text than the
  // build's tokenizer.
  Text(const std::string& folder, TextFile file, const std::string& library);

  // Any thread may call these. `special`: with the special tokens that the tokenizer puts around a text.
  // Throws Failure (usage) for what is no UTF-8.
  std::vector<std::int64_t> encode(const std::string& text, bool special) const;
  // Without special tokens; an incomplete character is U+FFFD.
  std::string decode(const std::vector<std::int64_t>& ids) const;

  const std::optional<Chat>& chat() const { return file_.chat; }
  // Token ids of a user's turn: of the chat's strings, or without a chat of the text itself, with special
  // tokens where it `begins`. Throws Failure (usage): a system prompt that cannot be.
  std::vector<std::int64_t> turn(const std::string& text, const std::optional<std::string>& system,
                                 bool begins) const;

 private:
  friend class TextStream;
  bool is_special(std::int64_t id) const;
  std::string decoded(const std::vector<std::int64_t>& ids) const;  // up to bytes that are no character
  std::string without_special(std::vector<std::int64_t> ids) const;
  void require_samples() const;
  TextFile file_;
  GenaiTokenizer tokenizer_;
  // What sentencepiece-like tokenizers do at a text's beginning, and onnxruntime-genai leaves to others.
  bool adds_space_ = false, drops_space_ = false;
};

// Text of tokens that come one by one: whole characters only, with the spaces that decoding all at once
// gives.
class TextStream {
 public:
  // A stream of what follows the prompt. Keeps a pointer to `text`.
  TextStream(const Text& text, const std::vector<std::int64_t>& prompt);
  // What this token completes; empty while a character is incomplete.
  std::string add(std::int64_t token);
  // What is left, an incomplete character included.
  std::string end();

 private:
  std::string grow();
  std::string skip();
  void forget();
  const Text* text_;
  std::vector<std::int64_t> ids_;  // the last tokens, from a character's first on
  std::string told_;               // their text, as far as it was given out
  std::size_t grown_ = 0;          // how many of them were there when the text last grew
  std::size_t boundary_ = 0;       // how many of them were there when a character last ended
};

}  // namespace kvexport::detail
