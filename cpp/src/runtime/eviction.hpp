// Layers that hold a budget of tokens: which slots a call may use, and who goes before a prompt's next tokens
// come. Does what kvexport/runtime/cache/eviction.py does. Knows slots, states and positions; must not know
// how attention reads them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "bundle/manifest.hpp"
#include "runtime/buffers.hpp"

namespace kvexport::detail {

// How many slots of the sequence are in use, alike in all heads and layers that evict, and how many tokens it
// had.
struct Occupancy {
  std::int64_t filled = 0, seen = 0;

  // What `write_index` says of `count` tokens, which are in use from then on. There is room for them, or
  // `count` is 1. `usable`: slots that may be in use; `slots`: how many there are.
  std::int64_t take(std::int64_t count, std::int64_t usable, std::int64_t slots);
  // The same of the very last token, which comes again: the graph finds its slot, or, while there is room, is
  // told.
  std::int64_t last(std::int64_t usable, std::int64_t slots) const {
    return filled >= usable ? slots : filled - 1;
  }
};

class Evictor {
 public:
  Evictor(const Manifest& manifest, Buffers& buffers);

  // Let tokens go in every layer that evicts until `keep` of `tokens` are left, before one at `position`
  // comes; they move to the first slots.
  void shrink(std::int64_t tokens, std::int64_t keep, std::int64_t position);
  // Leave `slots` slots to layers that evict: the others look taken, by tokens of the future, which nothing
  // sees and which never go. The buffers are empty.
  void block(std::int64_t slots);

 private:
  struct Move {
    std::int64_t target, source, slots;
    bool operator==(const Move& other) const {
      return target == other.target && source == other.source && slots == other.slots;
    }
  };
  void rank(const float* state, std::int64_t tokens, std::int64_t keep, std::int64_t position,
            std::optional<std::int64_t> window);
  void move(const Buffer& buffer, std::int64_t head, std::int64_t heads,
            const std::vector<Move>& moves) const;

  const Manifest& manifest_;
  Buffers& buffers_;
  // Of one layer or head, allocated once.
  std::vector<float> state_, priorities_;
  std::vector<std::int64_t> ranked_;
  std::vector<char> goes_;
  std::vector<Move> moves_, last_;
};

}  // namespace kvexport::detail
