// One conversation: the keys and values of its tokens, and the calls that add to them. Knows lengths, bounds
// and chunks; what runs the tokens is an Engine, and what they mean is for others to know.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engines/engine.hpp"
#include "runtime/buffers.hpp"
#include "runtime/eviction.hpp"
#include "runtime/session.hpp"

namespace kvexport::detail {

class Cache {
 public:
  // Empty, with room for `capacity` tokens, 0: for as many as can be. All of its memory is allocated here.
  // Self-tests name the tokens by which it grows, where the engine lets it, and the most of one call; 0: as
  // it is best.
  Cache(std::shared_ptr<const Session> session, std::int64_t capacity, std::int64_t step = 0,
        std::int64_t chunk = 0);

  // Throws Failure where `prefill` would refuse these tokens: there is none where the cache is empty, one is
  // outside the vocabulary, or there is no room for all of them.
  void require_prefill(const std::int64_t* ids, std::size_t count) const;
  // Feed tokens, after one that is pending. Logits [vocab_size] after the last one, until the next call;
  // where there is none to feed, the last one that was fed is run again in its place. A call that is refused
  // leaves the cache as it was.
  const float* prefill(const std::int64_t* ids, std::size_t count);
  const float* step(std::int64_t token);
  // As `prefill`, with logits after every token from the one at `from` on [count - from, vocab_size]; nothing
  // may be pending.
  std::vector<float> score(const std::int64_t* ids, std::size_t count, std::size_t from = 0);

  // Let this token be the next: it is pending, and the next call feeds it first.
  void choose(std::int64_t token) { pending_ = token; }
  const float* feed_pending();

  // A generation's hold on the cache: as long as there is one, no call of a user's may use it.
  class Lease {
   public:
    explicit Lease(Cache& cache) : cache_(cache) { cache_.leased_ = true; }
    ~Lease() { cache_.leased_ = false; }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

   private:
    Cache& cache_;
  };
  void require_not_leased() const;  // throws Failure where there is a Hold

  // Empty; keys and values of no token are `fill`, on which no result may depend.
  void clear(float fill = 0.0F);
  // Leave so many slots to layers that evict, until the cache is cleared. The cache is empty.
  void block(std::int64_t slots);

  void save(const std::string& file) const;
  // Hold what a file holds that `save` or Python wrote, and nothing else. Throws Failure: a damaged file, one
  // of another bundle, or more tokens than there is room for.
  void load(const std::string& file);

  const Session& session() const { return *session_; }
  std::int64_t length() const { return length_; }  // tokens that were fed
  std::int64_t capacity() const { return capacity_; }
  std::size_t bytes() const { return buffers_.bytes; }
  std::optional<std::int64_t> pending() const { return pending_; }
  bool empty() const { return length_ == 0 && !pending_; }
  std::vector<std::int64_t> last()
      const;  // the tokens that came last, two at most: what decoding the next ones must see

  // A layer's keys, values or state; null where it has none.
  const Buffer* buffer(int layer, Which which) const;
  // A copy of a buffer in float32, [heads, slots, width].
  std::vector<float> read(const Buffer& buffer) const;
  // Let a layer's state be this, [heads, slots, 2].
  void write_state(const Buffer& state, const std::vector<float>& values);

 private:
  void require_whole() const;
  void require_room(std::uint64_t tokens, const char* what) const;
  std::uint64_t with(std::size_t more) const;  // tokens in all
  const float* run(const std::int64_t* ids, std::int64_t count, std::int64_t logits, bool shrink,
                   bool again = false);
  std::int64_t admit(std::int64_t count, bool again);
  std::int64_t slots() const;  // of layers that evict

  std::shared_ptr<const Session> session_;  // outlives the rest
  std::int64_t capacity_, most_chunk_, chunk_;
  Buffers buffers_;
  std::optional<Evictor> evictor_;  // where layers evict
  Occupancy occupancy_;
  std::int64_t blocked_ = 0, length_ = 0, last_ = 0;
  std::optional<std::int64_t> pending_;
  bool broken_ = false, leased_ = false;
  std::vector<std::int64_t> positions_, indices_, ids_;
  std::unique_ptr<Binding> binding_;
};

}  // namespace kvexport::detail
