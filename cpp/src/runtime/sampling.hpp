// Selection of the next token from logits, as kvexport/runtime/sampling.py. Random numbers differ from
// Python's: the same seed gives the same tokens in every run, but other tokens than in Python.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

namespace kvexport::detail {

struct Sampling {
  double temperature = 0;             // 0: greedy
  std::int64_t top_k = 0;             // sample from the K most likely tokens; 0: all
  double top_p = 1;                   // sample from the fewest most likely tokens that reach this probability
  std::optional<std::uint64_t> seed;  // none: a random seed
};

class Sampler {
 public:
  // Throws Failure (usage) if a value is out of range.
  explicit Sampler(const Sampling& sampling);

  // Selects from `vocab_size` logits; of equal largest ones the first. Throws Failure if the logits are not
  // finite.
  std::int64_t choose(const float* logits, std::int64_t vocab_size);

 private:
  std::int64_t sample(const float* logits, std::size_t vocab_size, double largest);

  Sampling sampling_;
  std::mt19937_64 random_;
  std::vector<double> weights_;
  std::vector<std::int64_t> tokens_;
};

}  // namespace kvexport::detail
