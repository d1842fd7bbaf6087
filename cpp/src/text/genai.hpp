// A bundle's tokenizer through libonnxruntime-genai, opened at run time: its C API, of which nothing is
// needed to build. Knows that library and its ways; what the right ids are is told by text.json, not here.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvexport::detail {

class GenaiTokenizer {
 public:
  // `folder`: with tokenizer.json, tokenizer_config.json and genai_config.json. `library`: a name that the
  // dynamic linker finds, or a path. Throws Failure (cannot_run_here): the library is not there, is none, or
  // cannot read this tokenizer.
  GenaiTokenizer(const std::string& folder, const std::string& library);
  ~GenaiTokenizer();
  GenaiTokenizer(const GenaiTokenizer&) = delete;
  GenaiTokenizer& operator=(const GenaiTokenizer&) = delete;

  // Any thread may call these, one at a time inside. Without the special tokens that the tokenizer puts
  // around a text; those that are written in it are recognised. Throws Failure (usage) for what is no UTF-8
  // or has a NUL, which ends a C string.
  std::vector<std::int64_t> encode(const std::string& text) const;
  // With the text of special tokens left out; an incomplete character is U+FFFD.
  std::string decode(const std::vector<std::int64_t>& ids) const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace kvexport::detail
