// Conversion between text and token ids: a bundle's tokenizer, checked against the samples that were recorded
// at build time, and its chat strings.
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
  // `folder`: directory of the bundle; `file`: its parsed text.json; `library`: name or path of
  // libonnxruntime-genai. Throws Failure (cannot_run_here) if the library is missing, or does not reproduce
  // the samples.
  Text(const std::string& folder, TextFile file, const std::string& library);

  // Thread-safe. `special`: add the tokenizer's special tokens. Throws Failure (usage) if the text is not
  // UTF-8.
  std::vector<std::int64_t> encode(const std::string& text, bool special) const;
  // Omits special tokens; an incomplete character is U+FFFD.
  std::string decode(const std::vector<std::int64_t>& ids) const;

  const std::optional<Chat>& chat() const { return file_.chat; }
  // Token ids of a user's turn: formatted by the chat strings; without them the text itself, with special
  // tokens if it `begins` the conversation. Throws Failure (usage) if a system prompt is not possible.
  std::vector<std::int64_t> turn(const std::string& text, const std::optional<std::string>& system,
                                 bool begins) const;

 private:
  friend class TextStream;
  bool is_special(std::int64_t id) const;
  std::string decoded(const std::vector<std::int64_t>& ids) const;  // up to the first invalid byte
  std::string without_special(std::vector<std::int64_t> ids) const;
  void require_samples() const;
  TextFile file_;
  GenaiTokenizer tokenizer_;
  // The leading space of sentencepiece tokenizers, which onnxruntime-genai does not handle.
  bool adds_space_ = false, drops_space_ = false;
};

// Incremental decoding: outputs whole characters, with the same spaces as decoding all tokens at once.
class TextStream {
 public:
  // Starts behind the prompt. Keeps a pointer to `text`.
  TextStream(const Text& text, const std::vector<std::int64_t>& prompt);
  // The text that this token completes; empty while a character is incomplete.
  std::string add(std::int64_t token);
  // The remaining text; an incomplete character is U+FFFD.
  std::string end();

 private:
  std::string grow();
  std::string skip();
  void forget();
  const Text* text_;
  std::vector<std::int64_t> ids_;  // the last tokens, from the start of a character on
  std::string output_;             // the part of their text that was output
  std::size_t output_tokens_ = 0;  // number of tokens at the last output
  std::size_t boundary_ = 0;       // number of tokens at the last end of a character
};

}  // namespace kvexport::detail
