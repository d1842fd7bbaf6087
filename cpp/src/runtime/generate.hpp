// Tokens after a prompt: chosen, fed back, said as text, and stopped for a reason, as
// kvexport/runtime/generation.py does.
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

// Why it ended: a stop token or text came, so many tokens as were asked for, no room in the cache, or the
// callback said so.
enum class Finish { stop, length, capacity, callback };

struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  Sampling sampling;
  std::optional<std::vector<std::int64_t>> stop_tokens;  // none: the model's own
  std::vector<std::string> stop_texts;
};

// A new token with the whole characters that it completes ("" without a library for text), and at the end -1
// with what was held back, if anything was. False ends the generation.
using OnToken = std::function<bool(std::int64_t token, std::string_view text)>;

// Feeds the prompt and chosen tokens to the cache; a last token that was chosen and not fed is pending in it.
// Throws Failure as Cache::prefill and Sampler do, and whatever can be told before anything is fed is told
// then.
Finish generate(Cache& cache, const std::int64_t* ids, std::size_t count, const GenerateOptions& options,
                const OnToken& on_token);

// Lets text pass until one of some texts appears in it; what may be the beginning of one waits.
class StopTexts {
 public:
  explicit StopTexts(
      const std::vector<std::string>& texts);  // throws Failure: one of them is empty, or has a NUL

  // What may be said now that this came; nothing once a text was found.
  std::string add(const std::string& piece);
  // What waited, where no text was found.
  std::string end() const { return found_ ? std::string() : waiting_; }
  bool found() const { return found_; }

 private:
  std::size_t begun(const std::string& text) const;

  const std::vector<std::string>& texts_;
  std::string waiting_;
  bool found_ = false;
};

}  // namespace kvexport::detail
