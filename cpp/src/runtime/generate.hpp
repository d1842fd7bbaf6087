// Generation after a prompt: sampling, text output and stop conditions, as kvexport/runtime/generation.py.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cache.hpp"
#include "runtime/sampling.hpp"

namespace kvexport::detail {

// Why a generation ended: a stop token or stop text, max_new_tokens, a full cache, or the callback.
enum class Finish { stop, length, capacity, callback };

struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  Sampling sampling;
  std::optional<std::vector<std::int64_t>> stop_tokens;  // none: the model's EOS tokens
  std::vector<std::string> stop_texts;
};

// Called with each new token and the text that it completes ("" if the session has no tokenizer); at the end
// once with token -1 if text was held back. Return false to end the generation.
using OnToken = std::function<bool(std::int64_t token, std::string_view text)>;

// Runs the prompt and the generated tokens on the cache. The last generated token stays pending in it. Throws
// Failure as Cache::prefill and Sampler do; invalid arguments are reported before any token is run.
Finish generate(Cache& cache, const std::int64_t* ids, std::size_t count, const GenerateOptions& options,
                const OnToken& on_token);

// Passes text through until a stop text appears. Text that could be the start of a stop text is held back.
class StopTexts {
 public:
  // Throws Failure if a text is empty or contains NUL.
  explicit StopTexts(const std::vector<std::string>& texts);

  // Adds text and returns what can be output now; nothing after a stop text was found.
  std::string add(const std::string& piece);
  // The text that was held back, if no stop text was found.
  std::string end() const { return found_ ? std::string() : waiting_; }
  bool found() const { return found_; }

 private:
  std::size_t possible_start(const std::string& text) const;

  const std::vector<std::string>& texts_;
  std::string waiting_;
  bool found_ = false;
};

}  // namespace kvexport::detail
