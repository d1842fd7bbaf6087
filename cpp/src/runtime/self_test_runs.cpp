#include "runtime/self_test_runs.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace kvexport::detail {

namespace {

constexpr float GARBAGE = 1000;
// In tokens; small, so that few tokens need several growth steps and chunks. Rings hold CHUNK tokens besides
// their window.
constexpr std::int64_t STEP = 16, CHUNK = 7;
constexpr std::size_t SCORE = 0, POSITION_PLUS_ONE = 1, STATE_WIDTH = 2;
constexpr float MOST = 0x1p24F;    // positions are smaller
constexpr double LATER = 0x1p-20;  // relative change of a score per position

std::vector<Piece> pieces(std::int64_t start, std::int64_t stop, std::int64_t most) {
  std::vector<Piece> all;
  while (start < stop) {
    all.emplace_back(start, start + std::min(most, stop - start));
    start = all.back().second;
  }
  return all;
}

// Sum of squares.
double squares(const float* numbers, std::int64_t count) {
  double sum = 0;
  for (std::int64_t at = 0; at < count; ++at)
    sum += static_cast<double>(numbers[at]) * static_cast<double>(numbers[at]);
  return sum;
}

// L2 norm of a key or value in a layer that does not evict.
double norm_of_slot(const std::vector<float>& values, const Buffer& buffer, std::int64_t slot) {
  double sum = 0;
  for (std::int64_t head = 0; head < buffer.heads; ++head) {
    sum += squares(values.data() + (head * buffer.slots + slot) * buffer.width, buffer.width);
  }
  return std::sqrt(sum);
}

// Capacity for `tokens` tokens, with some slots that stay unused.
std::int64_t room_for(std::int64_t tokens, std::int64_t most) {
  return std::min((tokens + STEP - 1) / STEP * STEP, most);
}

// Scores that rounding does not change, different for all tokens of a head; as
// kvexport.bundle.self_test_file.steady_scores.
float steady(std::int64_t position_plus_one, std::int64_t head) {
  return static_cast<float>((7919 * position_plus_one + 104729 * head) % 65537);
}

}  // namespace

double larger(double worst, double error) {
  return std::isfinite(error) ? std::max(worst, error) : std::numeric_limits<double>::infinity();
}

Runs::Runs(const std::shared_ptr<const Session>& session, const ReferenceOutputs& reference)
    : tokens(std::min(static_cast<std::int64_t>(reference.tokens.size()), session->engine->capacity())),
      prompt(std::min(reference.prompt, tokens)),
      reference_(reference),
      manifest_(session->manifest()),
      max_tokens_per_call_(session->engine->max_tokens_per_call()),
      ranked_by_norm_(manifest_.eviction &&
                      (manifest_.eviction->policy == "l2-norm" || manifest_.eviction->policy == "keep-high")),
      cache_(session, room_for(tokens, session->engine->capacity()), STEP, max_tokens_per_call_, CHUNK) {}

std::vector<Measured> Runs::at_once() {
  return run_pieces(pieces(0, reference_.slots ? prompt : tokens, max_tokens_per_call_));
}

std::vector<Measured> Runs::step_by_step() {
  std::vector<Piece> all = pieces(0, prompt, std::min(max_tokens_per_call_, CHUNK));
  const std::vector<Piece> single = pieces(prompt, tokens, 1);
  all.insert(all.end(), single.begin(), single.end());
  return run_pieces(all);
}

std::int64_t Runs::generated(std::int64_t most) {
  begin();
  std::vector<Measured> last;
  for (const Piece& piece : pieces(0, prompt, std::min(max_tokens_per_call_, CHUNK))) {
    last = run_piece(piece);
  }
  for (std::int64_t at = prompt; at < prompt + most; ++at) {
    const std::int64_t token = last.back().likeliest;
    if (token != reference_.tokens[static_cast<std::size_t>(at)]) return at - prompt;
    last = call(&token, {at, at + 1});
  }
  return most;
}

void Runs::begin() {
  cache_.clear(GARBAGE);
  for (int layer = 0; reference_.slots && layer < static_cast<int>(manifest_.layers.size()); ++layer) {
    const Buffer* state = cache_.buffer(layer, Which::state);
    if (state == nullptr) continue;
    if (state->max_slots > *reference_.slots) cache_.block(*reference_.slots);
    return;
  }
}

std::vector<Measured> Runs::run_pieces(const std::vector<Piece>& pieces) {
  begin();
  std::vector<Measured> rows;
  for (const Piece& piece : pieces) {
    for (Measured& row : run_piece(piece)) rows.push_back(std::move(row));
  }
  for (int layer = 0; layer < static_cast<int>(manifest_.layers.size()); ++layer) {
    if (!loses_tokens(layer)) read_norms(layer, reference_.first_row, rows);
  }
  return rows;
}

// Runs a piece of the tokens in calls that the rings have room for.
std::vector<Measured> Runs::run_piece(Piece piece) {
  std::vector<Measured> rows;
  while (piece.first < piece.second) {
    const Piece part{piece.first, piece.first + cache_.tokens_of_call(piece.second - piece.first)};
    for (Measured& row : call(reference_.tokens.data() + part.first, part)) rows.push_back(std::move(row));
    piece.first = part.second;
  }
  return rows;
}

// Runs one call. Rows before the first reference row are omitted; norms of layers that keep all tokens are
// filled in later.
std::vector<Measured> Runs::call(const std::int64_t* ids, Piece piece) {
  const std::int64_t count = piece.second - piece.first, first = std::max(piece.first, reference_.first_row);
  const std::int64_t from = std::min(first - piece.first, count);
  const std::vector<float> logits =
      cache_.score(ids, static_cast<std::size_t>(count), static_cast<std::size_t>(from));
  std::vector<Measured> rows;
  for (std::int64_t row = 0; row < count - from; ++row)
    rows.push_back(measured(logits.data() + row * manifest_.vocab_size));
  for (int layer = 0; layer < static_cast<int>(manifest_.layers.size()); ++layer) {
    if (manifest_.evicts(layer)) {
      read_evicting(layer, first, rows);
    } else if (loses_tokens(layer)) {
      read_norms(layer, first, rows);
    }
  }
  return rows;
}

// Whether the layer's cache does not hold all tokens at the end of a run, so that it is read after each call.
bool Runs::loses_tokens(int layer) const {
  return manifest_.evicts(layer) || cache_.buffer(layer, Which::key)->max_slots < tokens;
}

// Reads the norms of the tokens from position `first` on in a layer that does not evict.
void Runs::read_norms(int layer, std::int64_t first, std::vector<Measured>& rows) const {
  const Buffer &key = *cache_.buffer(layer, Which::key), &value = *cache_.buffer(layer, Which::value);
  const std::vector<float> keys = cache_.read(key), values = cache_.read(value);
  const auto at = static_cast<std::size_t>(layer);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const std::int64_t slot = (first + static_cast<std::int64_t>(row)) % key.slots;
    rows[row].key_norms[at] = norm_of_slot(keys, key, slot),
    rows[row].value_norms[at] = norm_of_slot(values, value, slot);
  }
}

Measured Runs::measured(const float* logits) const {
  const std::int64_t vocab = manifest_.vocab_size;
  const std::vector<double> none(manifest_.layers.size());
  Measured row{std::sqrt(squares(logits, vocab) / static_cast<double>(vocab)), 0, {}, none, none, none};
  for (std::int64_t token = 1; token < vocab && !std::isnan(logits[row.likeliest]); ++token) {
    if (logits[token] > logits[row.likeliest] || std::isnan(logits[token])) row.likeliest = token;
  }
  for (const std::int64_t index : reference_.logit_indices) row.values.push_back(logits[index]);
  return row;
}

// Reads norms and scores of the tokens from position `first` on from the slots that their states name, then
// replaces the scores by steady ones.
void Runs::read_evicting(int layer, std::int64_t first, std::vector<Measured>& rows) {
  const Buffer &state = *cache_.buffer(layer, Which::state), &key = *cache_.buffer(layer, Which::key),
               &value = *cache_.buffer(layer, Which::value);
  std::vector<float> states = cache_.read(state);
  const std::vector<float> keys = cache_.read(key), values = cache_.read(value);
  const auto at = static_cast<std::size_t>(layer);
  const std::int64_t usable = state.max_slots > *reference_.slots ? *reference_.slots : state.slots;
  const auto of_slot = [&](std::int64_t head, std::int64_t slot) {
    return states.data() + (head * state.slots + slot) * static_cast<std::int64_t>(STATE_WIDTH);
  };
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const std::int64_t position = first + static_cast<std::int64_t>(row);
    double key_sum = 0, value_sum = 0, worst = 0;
    for (std::int64_t head = 0; head < state.heads; ++head) {
      std::int64_t matches = 0, slot = 0;
      for (std::int64_t each = 0; each < usable; ++each) {
        if (of_slot(head, each)[POSITION_PLUS_ONE] == static_cast<float>(position + 1))
          ++matches, slot = each;
      }
      const float* its_key = keys.data() + (head * key.slots + slot) * key.width;
      const double nan_if_lost = matches == 1 ? 0 : std::numeric_limits<double>::quiet_NaN();
      key_sum += squares(its_key, key.width) + nan_if_lost;
      value_sum +=
          squares(values.data() + (head * value.slots + slot) * value.width, value.width) + nan_if_lost;
      if (ranked_by_norm_ && matches == 1)
        worst = larger(worst, score_error(of_slot(head, slot)[SCORE], its_key, key, position));
    }
    rows[row].key_norms[at] = std::sqrt(key_sum), rows[row].value_norms[at] = std::sqrt(value_sum);
    if (!std::isnan(key_sum)) rows[row].scores[at] = worst;
  }
  if (!ranked_by_norm_) return;
  for (std::int64_t head = 0; head < state.heads; ++head) {
    for (std::int64_t slot = 0; slot < usable; ++slot) {
      float* of = of_slot(head, slot);
      if (!(of[POSITION_PLUS_ONE] > 0 && of[POSITION_PLUS_ONE] <= MOST)) continue;
      of[SCORE] = steady(static_cast<std::int64_t>(of[POSITION_PLUS_ONE]), layer * state.heads + head);
    }
  }
  cache_.write_state(state, states);
}

// Relative error of the score of a key.
double Runs::score_error(float score, const float* key, const Buffer& keys, std::int64_t row) const {
  const double norm = std::sqrt(squares(key, keys.width)), later = static_cast<double>(row + 1) * LATER;
  const double expected = manifest_.eviction->policy == "l2-norm" ? norm * (1 - later) : -norm * (1 + later);
  return std::fabs(static_cast<double>(score) - expected) / std::max(std::fabs(expected), SELF_TEST_FLOOR);
}

}  // namespace kvexport::detail
