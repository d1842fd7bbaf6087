// A bundle's tokenizer through the C API of libonnxruntime-genai, which is opened at run time. Building needs
// none of its files.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvexport::detail {

class GenaiTokenizer {
 public:
  // `folder`: directory with tokenizer.json, tokenizer_config.json and genai_config.json. `library`: name or
  // path for dlopen. Throws Failure (cannot_run_here) if the library is missing or has another API, or cannot
  // read the tokenizer.
  GenaiTokenizer(const std::string& folder, const std::string& library);
  ~GenaiTokenizer();
  GenaiTokenizer(const GenaiTokenizer&) = delete;
  GenaiTokenizer& operator=(const GenaiTokenizer&) = delete;

  // Thread-safe. Adds no special tokens; special tokens in the text are recognized. Throws Failure (usage) if
  // the text is not UTF-8 or contains NUL, which ends a C string.
  std::vector<std::int64_t> encode(const std::string& text) const;
  // Omits special tokens; an incomplete character is U+FFFD.
  std::string decode(const std::vector<std::int64_t>& ids) const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace kvexport::detail
