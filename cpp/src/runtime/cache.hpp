// The KV cache of one conversation: lengths, bounds and chunks. The tokens are run by an Engine.
#pragma once

#include <algorithm>
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
  // An empty cache for `capacity` tokens; 0: as many as the session allows. Allocates all of its memory.
  // The others are set by self-tests; 0: the defaults. `step`: number of tokens by which the cache grows, if
  // the engine allows it. `chunk`: largest number of tokens in one call. `ring_chunk`: number of tokens that
  // a ring holds besides its window, if the engine does not fix it; 0: `chunk`.
  Cache(std::shared_ptr<const Session> session, std::int64_t capacity, std::int64_t step = 0,
        std::int64_t chunk = 0, std::int64_t ring_chunk = 0);

  // Checks the arguments of `prefill`. Throws Failure if there are no tokens and the cache is empty, a token
  // is outside the vocabulary, or the tokens do not fit.
  void require_prefill(const std::int64_t* ids, std::size_t count) const;
  // Runs tokens, after the pending token if there is one. Returns the logits [vocab_size] after the last
  // token; they are valid until the next call. Without new tokens, the last token is run again in its place.
  // If the arguments are invalid, Failure is thrown and the cache is unchanged.
  const float* prefill(const std::int64_t* ids, std::size_t count);
  const float* step(std::int64_t token);
  // As `prefill`, but returns the logits after every token from index `from` on, [count - from, vocab_size].
  // There must be no pending token.
  std::vector<float> score(const std::int64_t* ids, std::size_t count, std::size_t from = 0);

  // The number of tokens, at most `count`, that the next call of the engine runs.
  std::int64_t tokens_of_call(std::int64_t count) const {
    return buffers_.tokens_of_call(length_, std::min(chunk_, count));
  }

  // Sets the pending token, which the next call runs first.
  void choose(std::int64_t token) { pending_ = token; }
  const float* run_pending();

  // Reserves the cache for a generation. While a lease exists, user calls on the cache are refused.
  class Lease {
   public:
    explicit Lease(Cache& cache) : cache_(cache) { cache_.leased_ = true; }
    ~Lease() { cache_.leased_ = false; }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

   private:
    Cache& cache_;
  };
  void require_not_leased() const;  // throws Failure if there is a lease

  // Empties the cache. Keys and values are set to `fill`; results must not depend on it.
  void clear(float fill = 0.0F);
  // Restricts layers that evict to `slots` slots until the cache is cleared. The cache must be empty.
  void block(std::int64_t slots);

  void save(const std::string& file) const;
  // Replaces the contents by those of a file that `save` or Python wrote. Throws Failure if the file is
  // damaged or belongs to another bundle, or if its tokens do not fit.
  void load(const std::string& file);

  const Session& session() const { return *session_; }
  std::int64_t length() const { return length_; }  // tokens that were run
  std::int64_t capacity() const { return capacity_; }
  std::size_t bytes() const { return buffers_.bytes; }
  std::optional<std::int64_t> pending() const { return pending_; }
  bool empty() const { return length_ == 0 && !pending_; }
  std::vector<std::int64_t> last() const;  // the last one or two tokens, as context for decoding text

  // Keys, values or state of a layer; null if the layer has none.
  const Buffer* buffer(int layer, Which which) const;
  // The contents of a buffer as float32, [heads, slots, width].
  std::vector<float> read(const Buffer& buffer) const;
  // Replaces the state of a layer, [heads, slots, 2].
  void write_state(const Buffer& state, const std::vector<float>& values);

 private:
  void require_intact() const;
  void require_room(std::uint64_t tokens, const char* what) const;
  std::uint64_t length_with(std::size_t more) const;  // length including pending and new tokens
  const float* run(const std::int64_t* ids, std::int64_t count, std::int64_t logits, bool shrink,
                   bool again = false);
  std::int64_t admit(std::int64_t count, bool again);
  std::int64_t slots() const;  // of layers that evict

  std::shared_ptr<const Session> session_;  // must outlive the other members
  std::int64_t capacity_, max_chunk_, chunk_;
  Buffers buffers_;
  std::optional<Evictor> evictor_;  // only if layers evict
  Occupancy occupancy_;
  std::int64_t blocked_ = 0, length_ = 0, last_ = 0;
  std::optional<std::int64_t> pending_;
  bool failed_midway_ = false, leased_ = false;
  std::vector<std::int64_t> positions_, indices_, ids_;
  std::unique_ptr<Binding> binding_;
};

}  // namespace kvexport::detail
