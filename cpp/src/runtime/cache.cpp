#include "runtime/cache.hpp"

#include <algorithm>
#include <cassert>
#include <limits>
#include <numeric>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {

std::int64_t growth_step_of(const Engine& engine, std::int64_t requested) {
  return requested == 0 || engine.growth_step() == 0 ? engine.growth_step() : requested;
}

}  // namespace

Cache::Cache(std::shared_ptr<const Session> session, std::int64_t capacity, std::int64_t step,
             std::int64_t chunk, std::int64_t ring_chunk)
    : session_(std::move(session)),
      capacity_(session_->capacity_of(capacity)),
      max_chunk_(session_->chunk_of(capacity_, chunk)),
      chunk_(max_chunk_),
      buffers_(session_->manifest(),
               session_->buffer_size({capacity_, ring_chunk == 0 ? max_chunk_ : ring_chunk}),
               session_->engine->storage(), growth_step_of(*session_->engine, step)),
      positions_(static_cast<std::size_t>(chunk_)),
      indices_(static_cast<std::size_t>(chunk_)),
      binding_(session_->engine->bind(buffers_)) {
  if (session_->manifest().eviction) evictor_.emplace(session_->manifest(), buffers_);
}

void Cache::require_prefill(const std::int64_t* ids, std::size_t count) const {
  require_intact();
  if (count == 0 && empty())
    throw Failure(Code::usage, "a prompt must not be empty", "", "", "give at least one token");
  require_room(length_with(count), length_ == 0 ? "the prompt must fit the capacity"
                                                : "the prompt must fit behind the tokens in the cache");
  session_->require_ids(ids, count);
}

const float* Cache::prefill(const std::int64_t* ids, std::size_t count) {
  require_prefill(ids, count);
  const auto total = static_cast<std::int64_t>(count) + (pending_ ? 1 : 0);
  if (pending_) {
    ids_.assign(1, *pending_);
    ids_.insert(ids_.end(), ids, ids + count);
    ids = ids_.data();
  }
  if (total == 0) {
    const std::int64_t last = last_;
    --length_;  // `run` adds 1 again
    return run(&last, 1, 1, false, true);
  }
  const float* logits = nullptr;
  for (std::int64_t start = 0, size = 0; start < total; start += size) {
    size = tokens_of_call(total - start);
    logits = run(ids + start, size, 1, start + size == total);
    pending_.reset();
  }
  return logits;
}

const float* Cache::step(std::int64_t token) {
  require_intact();
  session_->require_ids(&token, 1);
  require_room(length_with(1), "the token must fit the capacity");
  if (pending_) run_pending();
  return run(&token, 1, 1, false);
}

const float* Cache::run_pending() {
  require_intact();
  require_room(length_with(0), "the token must fit the capacity");
  const float* logits = run(&*pending_, 1, 1, false);
  pending_.reset();
  return logits;
}

std::vector<float> Cache::score(const std::int64_t* ids, std::size_t count, std::size_t from) {
  require_intact();
  require_room(length_with(count), "the tokens must fit the capacity");
  session_->require_ids(ids, count);
  const auto total = static_cast<std::int64_t>(count), vocab = session_->manifest().vocab_size;
  std::vector<float> scored;
  scored.reserve((count - std::min(count, from)) * static_cast<std::size_t>(vocab));
  for (std::int64_t start = 0, size = 0; start < total; start += size) {
    size = tokens_of_call(total - start);
    const std::int64_t rows = std::min(size, start + size - static_cast<std::int64_t>(std::min(count, from)));
    const float* logits = run(ids + start, size, std::max<std::int64_t>(1, rows), start + size == total);
    if (rows > 0) scored.insert(scored.end(), logits, logits + rows * vocab);
  }
  return scored;
}

void Cache::clear(float fill) {
  buffers_.clear(fill);
  occupancy_ = {};
  blocked_ = length_ = last_ = 0;
  chunk_ = max_chunk_;
  pending_.reset();
  failed_midway_ = false;
}

void Cache::block(std::int64_t slots) {
  if (!evictor_) return;
  buffers_.reserve(this->slots());
  blocked_ = this->slots() - slots;
  chunk_ = std::min(chunk_, slots);
  evictor_->block(slots);
}

std::vector<std::int64_t> Cache::last() const {
  std::vector<std::int64_t> ids;
  if (length_ > 0) ids.push_back(last_);
  if (pending_) ids.push_back(*pending_);
  return ids;
}

const Buffer* Cache::buffer(int layer, Which which) const {
  const auto match = std::find_if(buffers_.all.begin(), buffers_.all.end(), [&](const Buffer& each) {
    return each.layer == layer && each.which == which;
  });
  return match == buffers_.all.end() ? nullptr : &*match;
}

std::vector<float> Cache::read(const Buffer& buffer) const {
  std::vector<char> bytes(buffer.bytes());
  buffers_.storage.download(bytes.data(), buffer.address, bytes.size());
  buffers_.storage.synchronize();
  std::vector<float> values(bytes.size() / size_of(buffer.dtype));
  for (std::size_t at = 0; at < values.size(); ++at) {
    values[at] = as_float(bytes.data() + at * size_of(buffer.dtype), buffer.dtype);
  }
  return values;
}

void Cache::write_state(const Buffer& state, const std::vector<float>& values) {
  buffers_.storage.upload(state.address, values.data(), state.bytes());
  buffers_.storage.synchronize();
}

void Cache::require_intact() const {
  if (!failed_midway_) return;
  throw Failure(Code::usage, "a previous call failed midway; the cache contents are undefined", "", "",
                "clear the cache or load a saved one");
}

void Cache::require_not_leased() const {
  if (!leased_) return;
  throw Failure(Code::usage, "the cache must not be used by another call while it generates",
                "a call from on_token", "", "end the generation first: return false from on_token");
}

// Length of the sequence with `more` further tokens, saturated.
std::uint64_t Cache::length_with(std::size_t more) const {
  const std::uint64_t current = static_cast<std::uint64_t>(length_) + (pending_ ? 1 : 0),
                      total = current + more;
  return total < current ? std::numeric_limits<std::uint64_t>::max() : total;
}

void Cache::require_room(std::uint64_t tokens, const char* what) const {
  const auto within = [tokens](std::int64_t most) { return tokens <= static_cast<std::uint64_t>(most); };
  if (within(capacity_)) return;
  const Manifest& manifest = session_->manifest();
  const auto trained = manifest.max_position_embeddings;
  const std::string enough = std::to_string(tokens) + " or more";
  std::string fix = "shorten the text";
  if (within(session_->engine->capacity())) {
    fix = "make the cache with a capacity of " + enough;
  } else if (within(manifest.capacity)) {
    fix += ", or build the engine again with --capacity " + enough;
  } else if (!trained || within(*trained)) {
    fix += ", or build the bundle again with --capacity " + enough;
  } else {
    fix += ": the model was trained for " + std::to_string(*trained) + " positions";
  }
  throw Failure(Code::usage, what, std::to_string(tokens) + " tokens", "at most " + std::to_string(capacity_),
                fix);
}

// Runs `count` tokens after those in the cache; the last `logits` of them get logits. The caller has checked
// that there is room. `again`: the token is the last one of the cache, which is run a second time.
const float* Cache::run(const std::int64_t* ids, std::int64_t count, std::int64_t logits, bool shrink,
                        bool again) {
  assert(tokens_of_call(count) == count && "a call must not wrap in a ring");
  failed_midway_ = true;  // an exception from here on leaves the contents undefined
  buffers_.reserve(length_ + count);
  std::iota(positions_.begin(), positions_.begin() + count, length_);
  std::iota(indices_.begin(), indices_.begin() + logits, count - logits);
  Call call{ids, positions_.data(), count, admit(count, again), indices_.data(), logits, shrink};
  const float* result = session_->engine->run(*binding_, call);
  failed_midway_ = false;
  length_ += count;
  last_ = ids[count - 1];
  return result;
}

// Assigns slots to `count` tokens and returns their write index. With eviction, several tokens at once first
// make room for themselves.
std::int64_t Cache::admit(std::int64_t count, bool again) {
  if (!evictor_) return length_;
  const std::int64_t layout_slots = std::min(slots(), buffers_.layout_tokens),
                     usable = layout_slots - blocked_;
  if (count > 1 && occupancy_.filled > usable - count) {
    evictor_->shrink(occupancy_.filled, usable - count, occupancy_.seen);
    occupancy_.filled = usable - count;
  }
  return again ? occupancy_.last(usable, layout_slots) : occupancy_.take(count, usable, layout_slots);
}

std::int64_t Cache::slots() const {
  return std::min(session_->manifest().eviction->budget, buffers_.capacity);
}

}  // namespace kvexport::detail
