#include "runtime/eviction.hpp"

#include <algorithm>
#include <cassert>
#include <limits>
#include <numeric>

namespace kvexport::detail {

namespace {

// Columns of a slot's state, and priorities outside the range of scores, as in kvexport/eviction/config.py.
constexpr std::size_t SCORE = 0, POSITION_PLUS_ONE = 1, STATE_WIDTH = 2;
constexpr float NEVER = 0x1p100F, OUT_OF_WINDOW = 0x1p60F, LATEST = 0x1p24F;

}  // namespace

std::int64_t Occupancy::take(std::int64_t count, std::int64_t usable, std::int64_t slots) {
  assert(count == 1 || filled + count <= usable);
  const std::int64_t index = filled >= usable ? slots : filled;
  filled = std::min(filled + count, usable);
  seen += count;
  return index;
}

Evictor::Evictor(const Manifest& manifest, Buffers& buffers) : manifest_(manifest), buffers_(buffers) {
  std::int64_t heads = 0, slots = 0;
  for (const Buffer& buffer : buffers.all) {
    if (!buffer.evicts) continue;
    heads = std::max(heads, buffer.heads);
    slots = buffer.max_slots;
  }
  const auto most = static_cast<std::size_t>(slots);
  state_.resize(static_cast<std::size_t>(heads) * most * STATE_WIDTH);
  priorities_.resize(most);
  ranked_.resize(most);
  goes_.resize(most);
  moves_.reserve(most);
  last_.reserve(most);
}

void Evictor::shrink(std::int64_t tokens, std::int64_t keep, std::int64_t position) {
  Storage& storage = buffers_.storage;
  for (std::size_t at = 0; at < buffers_.all.size(); ++at) {
    const Buffer& state = buffers_.all[at];
    if (state.which != Which::state) continue;
    const Buffer &key = buffers_.all[at - 2], &value = buffers_.all[at - 1];
    const std::optional<std::int64_t> window = manifest_.layers[static_cast<std::size_t>(state.layer)].window;
    storage.download(state_.data(), state.address, state.bytes());
    storage.synchronize();
    last_.clear();
    // First head with the moves `last_`; consecutive heads with equal moves are moved together.
    std::int64_t first = 0;
    for (std::int64_t head = 0; head < state.heads; ++head) {
      float* of_head = state_.data() + static_cast<std::size_t>(head * state.slots) * STATE_WIDTH;
      rank(of_head, tokens, keep, position, window);
      if (head > 0 && moves_ != last_) {
        for (const Buffer* moved : {&key, &value}) move(*moved, first, head - first, last_);
        first = head;
      }
      std::swap(moves_, last_);
      for (const Move& each : last_) {
        std::copy_n(of_head + static_cast<std::size_t>(each.source) * STATE_WIDTH,
                    static_cast<std::size_t>(each.slots) * STATE_WIDTH,
                    of_head + static_cast<std::size_t>(each.target) * STATE_WIDTH);
      }
      std::fill(of_head + static_cast<std::size_t>(keep) * STATE_WIDTH,
                of_head + static_cast<std::size_t>(tokens) * STATE_WIDTH, 0.0F);
    }
    for (const Buffer* moved : {&key, &value}) move(*moved, first, state.heads - first, last_);
    storage.upload(state.address, state_.data(), state.bytes());
    storage.synchronize();  // `state_` is reused by the next layer
  }
}

// Fills `moves_` with the fewest moves that bring the remaining tokens to the first `keep` slots. A token
// stays in its slot or comes from a slot behind the first `keep`, so no move overwrites the source of
// another.
void Evictor::rank(const float* state, std::int64_t tokens, std::int64_t keep, std::int64_t position,
                   std::optional<std::int64_t> window) {
  const Eviction& eviction = *manifest_.eviction;
  const auto following = static_cast<float>(position + 1);
  const auto recent = static_cast<float>(
      std::max<std::int64_t>(0, std::min(eviction.protect_recent, keep - eviction.protect_first)));
  const auto first = static_cast<float>(eviction.protect_first);
  const auto count = static_cast<std::size_t>(tokens);
  for (std::size_t slot = 0; slot < count; ++slot) {
    const float score = state[slot * STATE_WIDTH + SCORE],
                position_plus_one = state[slot * STATE_WIDTH + POSITION_PLUS_ONE];
    float priority = position_plus_one <= following - recent && position_plus_one > first ? score : -NEVER;
    if (window && position_plus_one <= following - static_cast<float>(*window))
      priority = (LATEST - position_plus_one) * OUT_OF_WINDOW;
    if (position_plus_one == following) priority = NEVER;
    if (!(priority == priority)) priority = -std::numeric_limits<float>::infinity();  // NaN is not ordered
    priorities_[slot] = priority;
  }
  const auto ranked = ranked_.begin();
  std::iota(ranked, ranked + tokens, 0);
  std::nth_element(ranked, ranked + (tokens - keep), ranked + tokens,
                   [this](std::int64_t one, std::int64_t other) {
                     const float left = priorities_[static_cast<std::size_t>(one)],
                                 right = priorities_[static_cast<std::size_t>(other)];
                     return left != right ? left > right : one < other;
                   });
  std::fill_n(goes_.begin(), tokens, char{0});
  std::for_each(ranked, ranked + (tokens - keep),
                [this](std::int64_t slot) { goes_[static_cast<std::size_t>(slot)] = 1; });
  moves_.clear();
  std::int64_t source = keep;
  for (std::int64_t target = 0; target < keep; ++target) {
    if (goes_[static_cast<std::size_t>(target)] == 0) continue;
    while (goes_[static_cast<std::size_t>(source)] != 0) ++source;
    if (!moves_.empty() && moves_.back().target + moves_.back().slots == target &&
        moves_.back().source + moves_.back().slots == source) {
      ++moves_.back().slots;
    } else {
      moves_.push_back({target, source, 1});
    }
    ++source;
  }
}

void Evictor::move(const Buffer& buffer, std::int64_t head, std::int64_t heads,
                   const std::vector<Move>& moves) const {
  const std::size_t slot = buffer.slot_bytes(), pitch = static_cast<std::size_t>(buffer.slots) * slot;
  char* base = static_cast<char*>(buffer.address) + static_cast<std::size_t>(head) * pitch;
  for (const Move& each : moves) {
    buffers_.storage.copy_rows(base + static_cast<std::size_t>(each.target) * slot, pitch,
                               base + static_cast<std::size_t>(each.source) * slot, pitch,
                               static_cast<std::size_t>(each.slots) * slot, static_cast<std::size_t>(heads));
  }
}

void Evictor::block(std::int64_t slots) {
  for (const Buffer& buffer : buffers_.all) {
    if (buffer.which != Which::state) continue;
    std::fill(state_.begin(), state_.end(), 0.0F);
    for (std::int64_t head = 0; head < buffer.heads; ++head) {
      for (std::int64_t slot = slots; slot < buffer.slots; ++slot) {
        float* state = state_.data() + static_cast<std::size_t>(head * buffer.slots + slot) * STATE_WIDTH;
        state[SCORE] = -NEVER;
        state[POSITION_PLUS_ONE] = LATEST;
      }
    }
    buffers_.storage.upload(buffer.address, state_.data(), buffer.bytes());
    buffers_.storage.synchronize();
  }
}

}  // namespace kvexport::detail
