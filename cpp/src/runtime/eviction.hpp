// Layers with a token budget: which slots a call writes, and which tokens are evicted before a chunk of a
// prompt is run. Same algorithm as kvexport/runtime/cache/eviction.py.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "bundle/manifest.hpp"
#include "runtime/buffers.hpp"

namespace kvexport::detail {

// Number of slots in use, equal in all heads of all layers that evict, and number of tokens that were run.
struct Occupancy {
  std::int64_t filled = 0, seen = 0;

  // Takes slots for `count` tokens and returns the graph's write index for them. They fit, or `count` is 1.
  // `usable`: slots that may be used; `slots`: slots of the layout.
  std::int64_t take(std::int64_t count, std::int64_t usable, std::int64_t slots);
  // Write index for running the last token again. In a full cache the graph finds its slot itself.
  std::int64_t last(std::int64_t usable, std::int64_t slots) const {
    return filled >= usable ? slots : filled - 1;
  }
};

class Evictor {
 public:
  Evictor(const Manifest& manifest, Buffers& buffers);

  // Evicts tokens in every layer that evicts until `keep` of `tokens` remain, before a token at `position` is
  // run; the remaining ones are moved to the first slots.
  void shrink(std::int64_t tokens, std::int64_t keep, std::int64_t position);
  // Restricts the layers that evict to `slots` slots: the other slots are marked as tokens of future
  // positions, which are never attended to and never evicted. The buffers must be empty.
  void block(std::int64_t slots);

 private:
  void rank(const float* state, std::int64_t tokens, std::int64_t keep, std::int64_t position,
            std::optional<std::int64_t> window);
  void move(const Buffer& buffer, std::int64_t head, std::int64_t heads,
            const std::vector<Move>& moves) const;

  const Manifest& manifest_;
  Buffers& buffers_;
  // Working memory for one layer or head, allocated once.
  std::vector<float> state_, priorities_;
  std::vector<std::int64_t> ranked_;
  std::vector<char> goes_;
  std::vector<Move> moves_, last_;
};

}  // namespace kvexport::detail
