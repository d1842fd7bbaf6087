// Tokens of a self-test, run in a cache that is empty but for garbage, and what each of them leaves there.
// Knows caches and states; what the numbers ought to be is for self_test.cpp to know.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bundle/self_test_file.hpp"
#include "runtime/cache.hpp"
#include "runtime/session.hpp"

namespace kvexport::detail {

inline constexpr double SELF_TEST_FLOOR = 1e-6;  // norms and logits below it are as good as none

// A row as it is here; `scores` is the error of each layer's scores, 0 where they are not norms.
struct Measured {
  double rms = 0;
  std::int64_t likeliest = 0;
  std::vector<double> values, key_norms, value_norms, scores;
};

// The larger of two; infinite where the error is not a number.
double larger(double worst, double error);

using Piece =
    std::pair<std::int64_t, std::int64_t>;  // tokens of one call: the first, and the one behind the last

class Runs {
 public:
  Runs(const std::shared_ptr<const Session>& session, const ReferenceOutputs& reference);

  // Rows from the first one on, of everything at once: where layers evict, of the prompt alone, which fits
  // their slots.
  std::vector<Measured> at_once();
  // Rows of the prompt in short calls, and then of token by token, whatever is the likeliest.
  std::vector<Measured> step_by_step();
  // How many of the continuation's first `most` tokens come, each the likeliest after those before it.
  std::int64_t generated(std::int64_t most);

  const std::int64_t tokens;  // of prompt and continuation, as many as the engine takes
  const std::int64_t prompt;  // how many of them are the prompt

 private:
  void begin();
  std::vector<Measured> fed(const std::vector<Piece>& pieces);
  std::vector<Measured> call(const std::int64_t* ids, Piece piece);
  Measured measured(const float* logits) const;
  void read_evicting(int layer, std::int64_t first, std::vector<Measured>& rows);
  double score_error(float score, const float* key, const Buffer& keys, std::int64_t row) const;

  const ReferenceOutputs& reference_;
  const Manifest& manifest_;
  const std::int64_t max_tokens_per_call_;
  const bool ranked_by_norm_;
  Cache cache_;
};

}  // namespace kvexport::detail
