// Choosing the next token from logits, as kvexport/runtime/sampling.py does, with another source of
// randomness: the same seed draws the same tokens each time, but not those that Python draws. Knows
// probabilities, nothing of models or text.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

namespace kvexport::detail {

struct Sampling {
  double temperature = 0;             // 0: the likeliest token; above it tokens are drawn
  std::int64_t top_k = 0;             // draw from the K likeliest; 0: from all
  double top_p = 1;                   // and of those from the fewest likeliest that reach this probability
  std::optional<std::uint64_t> seed;  // none: another one each time
};

class Sampler {
 public:
  // Throws Failure (usage): a value is out of range.
  explicit Sampler(const Sampling& sampling);

  // Of `vocab_size` logits; of equally likely ones the first. Throws Failure: a logit is not finite.
  std::int64_t choose(const float* logits, std::int64_t vocab_size);

 private:
  std::int64_t draw(const float* logits, std::size_t vocab_size, double largest);

  Sampling sampling_;
  std::mt19937_64 random_;
  std::vector<double> weights_;
  std::vector<std::int64_t> tokens_;
};

}  // namespace kvexport::detail
