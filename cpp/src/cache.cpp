#include "cache.hpp"

#include <algorithm>
#include <numeric>

#include "error.hpp"

namespace kvexport::detail {

namespace {

std::int64_t chunk_of(const Session& session, std::int64_t wanted) {
  const auto& eviction = session.manifest().eviction;
  const std::int64_t chunk = std::min(wanted == 0 ? session.chunk : wanted, session.engine->longest());
  return eviction ? std::min(chunk, eviction->chunk()) : chunk;
}

std::int64_t step_of(const Engine& engine, std::int64_t wanted) {
  return wanted == 0 || engine.step() == 0 ? engine.step() : wanted;
}

std::string tokens_of(std::int64_t count) { return std::to_string(count) + " tokens"; }

}  // namespace

Cache::Cache(std::shared_ptr<const Session> session, std::int64_t capacity, std::int64_t step, std::int64_t chunk)
    : session_(std::move(session)),
      capacity_(session_->capacity_of(capacity)),
      most_chunk_(std::min(chunk_of(*session_, chunk), capacity_)),
      chunk_(most_chunk_),
      buffers_(session_->manifest(), session_->engine->fixed() ? session_->engine->capacity() : capacity_,
               session_->engine->place(), step_of(*session_->engine, step)),
      positions_(static_cast<std::size_t>(chunk_)),
      indices_(static_cast<std::size_t>(chunk_)),
      binding_(session_->engine->bind(buffers_)) {
  if (session_->manifest().eviction) evictor_.emplace(session_->manifest(), buffers_);
}

void Cache::require_prefill(const std::int64_t* ids, std::size_t count) const {
  require_whole();
  require_ids(ids, count);
  const auto whole = static_cast<std::int64_t>(count) + (pending_ ? 1 : 0);
  if (whole == 0) throw Failure(Code::usage, "a prompt is empty", "", "", "give at least one token");
  require_room(length_ + whole, length_ == 0 ? "the prompt is longer than the cache's capacity"
                                             : "the prompt does not fit behind what the cache holds");
}

const float* Cache::prefill(const std::int64_t* ids, std::size_t count) {
  require_prefill(ids, count);
  const auto whole = static_cast<std::int64_t>(count) + (pending_ ? 1 : 0);
  if (pending_) {
    ids_.assign(1, *pending_);
    ids_.insert(ids_.end(), ids, ids + count);
    ids = ids_.data();
  }
  const float* logits = nullptr;
  for (std::int64_t start = 0; start < whole; start += chunk_) {
    const std::int64_t here = std::min(chunk_, whole - start);
    logits = run(ids + start, here, 1, start + here == whole);
    pending_.reset();
  }
  return logits;
}

const float* Cache::step(std::int64_t token) {
  require_whole();
  require_ids(&token, 1);
  require_room(length_ + (pending_ ? 2 : 1), "the cache's capacity is exhausted");
  if (pending_) feed_pending();
  return run(&token, 1, 1, false);
}

const float* Cache::feed_pending() {
  require_whole();
  require_room(length_ + 1, "the cache's capacity is exhausted");
  const float* logits = run(&*pending_, 1, 1, false);
  pending_.reset();
  return logits;
}

std::vector<float> Cache::score(const std::int64_t* ids, std::size_t count, std::size_t from) {
  require_whole();
  require_ids(ids, count);
  const auto whole = static_cast<std::int64_t>(count), vocab = session_->manifest().vocab_size;
  require_room(length_ + whole, "the tokens exceed the cache's capacity");
  std::vector<float> scored;
  scored.reserve((count - std::min(count, from)) * static_cast<std::size_t>(vocab));
  for (std::int64_t start = 0; start < whole; start += chunk_) {
    const std::int64_t here = std::min(chunk_, whole - start);
    const std::int64_t wanted = std::min(here, start + here - static_cast<std::int64_t>(std::min(count, from)));
    const float* logits = run(ids + start, here, std::max<std::int64_t>(1, wanted), start + here == whole);
    if (wanted > 0) scored.insert(scored.end(), logits, logits + wanted * vocab);
  }
  return scored;
}

void Cache::clear(float fill) {
  buffers_.clear(fill);
  occupancy_ = {};
  blocked_ = length_ = last_ = 0;
  chunk_ = most_chunk_;
  pending_.reset();
  broken_ = false;
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
  const auto found = std::find_if(buffers_.all.begin(), buffers_.all.end(),
                                  [&](const Buffer& each) { return each.layer == layer && each.which == which; });
  return found == buffers_.all.end() ? nullptr : &*found;
}

std::vector<float> Cache::read(const Buffer& buffer) const {
  std::vector<char> bytes(buffer.bytes());
  buffers_.place.download(bytes.data(), buffer.address, bytes.size());
  buffers_.place.synchronize();
  std::vector<float> values(bytes.size() / size_of(buffer.dtype));
  for (std::size_t at = 0; at < values.size(); ++at) {
    values[at] = as_float(bytes.data() + at * size_of(buffer.dtype), buffer.dtype);
  }
  return values;
}

void Cache::write_state(const Buffer& state, const std::vector<float>& values) {
  buffers_.place.upload(state.address, values.data(), state.bytes());
  buffers_.place.synchronize();
}

void Cache::require_whole() const {
  if (!broken_) return;
  throw Failure(Code::usage, "a call on this cache was broken off in its midst, so that what it holds is not known", "", "",
                "begin anew: clear the cache");
}

void Cache::require_ids(const std::int64_t* ids, std::size_t count) const {
  const std::int64_t vocab = session_->manifest().vocab_size;
  const auto* wrong = std::find_if(ids, ids + count, [&](std::int64_t id) { return id < 0 || id >= vocab; });
  if (wrong == ids + count) return;
  throw Failure(Code::usage, "a token id is outside the vocabulary", std::to_string(*wrong),
                "0 to " + std::to_string(vocab - 1));
}

void Cache::require_room(std::int64_t tokens, const char* what) const {
  if (tokens <= capacity_) return;
  const Manifest& manifest = session_->manifest();
  const std::int64_t most = session_->engine->capacity();
  const auto trained = manifest.max_position_embeddings;
  std::string fix = "shorten the text: the model was trained for " + std::to_string(trained.value_or(0)) + " positions";
  if (capacity_ < most) {
    fix = "make the cache with a capacity of " + std::to_string(std::min(tokens, most)) + " or more";
  } else if (most < manifest.capacity) {
    fix = "shorten the text, or build the engine again with --capacity " + std::to_string(std::min(tokens, manifest.capacity)) +
          " or more";
  } else if (!trained || manifest.capacity < *trained) {
    fix = "shorten the text, or build the bundle again with --capacity " + std::to_string(tokens) + " or more";
  }
  throw Failure(Code::usage, what, tokens_of(tokens), "at most " + std::to_string(capacity_), fix);
}

// `count` tokens behind those that are held, of which the last `logits` get logits. There is room.
const float* Cache::run(const std::int64_t* ids, std::int64_t count, std::int64_t logits, bool shrink) {
  broken_ = true;  // whatever goes wrong from here on leaves the cache half written
  buffers_.reserve(length_ + count);
  std::iota(positions_.begin(), positions_.begin() + count, length_);
  std::iota(indices_.begin(), indices_.begin() + logits, count - logits);
  Call call{ids, positions_.data(), count, admit(count), indices_.data(), logits, shrink};
  const float* made = session_->engine->run(*binding_, call);
  broken_ = false;
  length_ += count;
  last_ = ids[count - 1];
  return made;
}

// What `write_index` must say of so many tokens; where layers evict, several make room first.
std::int64_t Cache::admit(std::int64_t count) {
  if (!evictor_) return length_;
  const std::int64_t there = std::min(slots(), buffers_.laid_out), usable = there - blocked_;
  if (count > 1 && occupancy_.filled > usable - count) {
    evictor_->shrink(occupancy_.filled, usable - count, occupancy_.seen);
    occupancy_.filled = usable - count;
  }
  return occupancy_.take(count, usable, there);
}

std::int64_t Cache::slots() const { return std::min(session_->manifest().eviction->budget, buffers_.capacity); }

}  // namespace kvexport::detail
