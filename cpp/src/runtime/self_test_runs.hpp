// The runs of a self-test: tokens in a cache filled with garbage, and the numbers that each token leaves in
// it. They are compared with the reference in self_test.cpp.
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

inline constexpr double SELF_TEST_FLOOR = 1e-6;  // lower bound of norms and logits in relative errors

// Measured numbers of one row. `scores`: error of the eviction score in each layer, 0 if the policy does not
// rank by norm.
struct Measured {
  double rms = 0;
  std::int64_t likeliest = 0;
  std::vector<double> values, key_norms, value_norms, scores;
};

// The larger one; infinity if the error is not finite.
double larger(double worst, double error);

using Piece = std::pair<std::int64_t, std::int64_t>;  // tokens of one call: first, and one past the last

class Runs {
 public:
  Runs(const std::shared_ptr<const Session>& session, const ReferenceOutputs& reference);

  // All tokens in as few calls as possible; if layers evict, the prompt only, which fits their slots.
  std::vector<Measured> at_once();
  // The prompt in short calls, then the continuation token by token.
  std::vector<Measured> step_by_step();
  // Generates greedily. Returns how many of the first `most` tokens of the continuation are reproduced.
  std::int64_t generated(std::int64_t most);

  const std::int64_t tokens;  // tokens of prompt and continuation that fit the engine
  const std::int64_t prompt;  // prompt tokens among them

 private:
  void begin();
  std::vector<Measured> run_pieces(const std::vector<Piece>& pieces);
  std::vector<Measured> run_piece(Piece piece);
  std::vector<Measured> call(const std::int64_t* ids, Piece piece);
  Measured measured(const float* logits) const;
  bool loses_tokens(int layer) const;
  void read_norms(int layer, std::int64_t first, std::vector<Measured>& rows) const;
  void read_evicting(int layer, std::int64_t first, std::vector<Measured>& rows);
  double score_error(float score, const float* key, const Buffer& keys, std::int64_t row) const;

  const ReferenceOutputs& reference_;
  const Manifest& manifest_;
  const std::int64_t max_tokens_per_call_;
  const bool ranked_by_norm_;
  Cache cache_;
};

}  // namespace kvexport::detail
