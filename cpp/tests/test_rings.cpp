// Layers with a window, whose caches hold the window and one call: slots, calls that never wrap, and saved
// caches, on an engine that computes which tokens each query sees.
#include <algorithm>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle/error.hpp"
#include "bundle/safetensors.hpp"
#include "check.hpp"
#include "files.hpp"
#include "runtime/cache.hpp"
#include "runtime/host_storage.hpp"

using namespace kvexport::detail;

namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::int64_t VOCAB = 31, CAPACITY = 200;
constexpr std::int64_t NARROW = 3, WIDE = 9;  // windows

// Layer 0: full attention; 1 and 2: windows; 3: a window that the capacity does not exceed.
Manifest manifest_of(std::int64_t capacity = CAPACITY) {
  Manifest manifest;
  manifest.digest = std::string(64, '0');
  manifest.vocab_size = VOCAB;
  manifest.capacity = capacity;
  manifest.layers = {{2, 1, 1, {}}, {2, 1, 1, NARROW}, {1, 1, 1, WIDE}, {1, 1, 1, capacity}};
  return manifest;
}

bool sees(const Layer& layer, std::int64_t query, std::int64_t position) {
  return position >= 0 && position <= query && (!layer.window || position > query - *layer.window);
}

// What a token adds to the logit of its id, as a small integer.
float weight(std::int64_t position, std::size_t layer) {
  return static_cast<float>((position + 1) * static_cast<std::int64_t>(1 + 5 * layer));
}

// Logits after the last token of a text, computed from the text.
std::vector<float> expected_logits(const Manifest& manifest, const Ids& text) {
  std::vector<float> logits(VOCAB);
  const auto query = static_cast<std::int64_t>(text.size()) - 1;
  for (std::size_t index = 0; index < manifest.layers.size(); ++index)
    for (std::int64_t position = 0; position <= query; ++position)
      if (sees(manifest.layers[index], query, position))
        logits[static_cast<std::size_t>(text[static_cast<std::size_t>(position)])] += weight(position, index);
  return logits;
}

float* slot_of(const Buffer& buffer, std::int64_t head, std::int64_t slot) {
  return static_cast<float*>(buffer.address) + (head * buffer.slots + slot) * buffer.width;
}

// Computes the same logits from the cache: the key of a token is its id, and its position follows from its
// slot. Fails if a call wraps.
class Counting final : public Engine {
 public:
  explicit Counting(Manifest manifest, std::int64_t step = 0, std::int64_t fixed_chunk = 0)
      : manifest_(std::move(manifest)), step_(step), fixed_chunk_(fixed_chunk) {}

  const std::string& provider() const override { return name_; }
  const std::string& version() const override { return name_; }
  Dtype computes_in() const override { return Dtype::float32; }
  Storage& storage() override { return storage_; }
  std::int64_t max_tokens_per_call() const override {
    return fixed_chunk_ == 0 ? std::numeric_limits<std::int64_t>::max() : fixed_chunk_;
  }
  std::int64_t capacity() const override { return manifest_.capacity; }
  bool has_fixed_capacity() const override { return fixed_chunk_ != 0; }
  std::int64_t growth_step() const override { return step_; }

  std::unique_ptr<Binding> bind(Buffers& buffers) override {
    auto bound = std::make_unique<Bound>();
    bound->buffers = &buffers;
    return bound;
  }
  const float* run(Binding& binding, const Call& call) override {
    auto& bound = static_cast<Bound&>(binding);
    bound.logits.assign(static_cast<std::size_t>(call.logits * VOCAB), 0);
    const std::int64_t first = call.position_ids[0], last = first + call.tokens - 1;
    for (const Buffer& buffer : bound.buffers->all) {
      const std::int64_t start = first % buffer.slots;
      CHECK(start + call.tokens <= buffer.slots);
      for (std::int64_t head = 0; head < buffer.heads; ++head)
        for (std::int64_t at = 0; at < call.tokens; ++at)
          *slot_of(buffer, head, start + at) = static_cast<float>(call.input_ids[at]);
      if (buffer.which != Which::key) continue;
      const auto index = static_cast<std::size_t>(buffer.layer);
      for (std::int64_t row = 0; row < call.logits; ++row) {
        const std::int64_t query = first + call.logits_index[row];
        for (std::int64_t slot = 0; slot < buffer.slots; ++slot) {
          const std::int64_t position = last - (last - slot + buffer.slots) % buffer.slots;
          if (!sees(manifest_.layers[index], query, position)) continue;
          const auto id = static_cast<std::int64_t>(*slot_of(buffer, buffer.heads - 1, slot));
          CHECK(id >= 0 && id < VOCAB);  // not what was in the slot before
          bound.logits[static_cast<std::size_t>(row * VOCAB + id)] += weight(position, index);
        }
      }
    }
    calls.push_back(call.tokens);
    return bound.logits.data();
  }

  std::vector<std::int64_t> calls;  // number of tokens of each

 private:
  struct Bound final : Binding {
    Buffers* buffers = nullptr;
    std::vector<float> logits;
  };
  const std::string name_ = "counting";
  Manifest manifest_;
  std::int64_t step_, fixed_chunk_;
  HostStorage storage_;
};

std::shared_ptr<const Session> session_of(std::int64_t step = 0, std::int64_t fixed_chunk = 0) {
  Bundle bundle;
  bundle.manifest = manifest_of();
  auto engine = std::make_unique<Counting>(bundle.manifest, step, fixed_chunk);
  return std::make_shared<const Session>(std::move(bundle), std::move(engine));
}

Ids tokens(std::size_t count, std::uint32_t seed = 1) {
  Ids ids(count);
  for (std::int64_t& id : ids)
    id = static_cast<std::int64_t>((seed = seed * 1664525U + 1013904223U) >> 8U) % VOCAB;
  return ids;
}

void require_logits(const Manifest& manifest, const float* logits, const Ids& text) {
  CHECK(std::vector<float>(logits, logits + VOCAB) == expected_logits(manifest, text));
}

// Continues `text`, which is in the cache, with prompts and single tokens, to the end of the cache.
void require_continuation(Cache& cache, Ids text) {
  const Manifest& manifest = cache.session().manifest();
  constexpr std::size_t sizes[] = {1, 4, 23, 1, 40};
  for (std::uint32_t turn = 0; static_cast<std::int64_t>(text.size()) < cache.capacity(); ++turn) {
    const std::size_t room = static_cast<std::size_t>(cache.capacity()) - text.size();
    const Ids more = tokens(std::min(room, sizes[turn % std::size(sizes)]), turn);
    text.insert(text.end(), more.begin(), more.end());
    require_logits(manifest, cache.prefill(more.data(), more.size()), text);
    require_logits(manifest, cache.prefill(nullptr, 0), text);  // the last token again
  }
  CHECK_EQUAL(cache.length(), cache.capacity());
}

std::int64_t slots_of(const std::vector<Buffer>& buffers, int layer) {
  for (const Buffer& buffer : buffers)
    if (buffer.layer == layer) return buffer.max_slots;
  return 0;
}

}  // namespace

TEST(rings_hold_the_window_and_one_call) {
  Manifest manifest = manifest_of();
  CHECK(!manifest.ring_of(0) && manifest.ring_of(1) == NARROW && manifest.ring_of(2) == WIDE);
  CHECK(!manifest.ring_of(3));
  const auto slots = [&](std::int64_t capacity, std::int64_t chunk) {
    const std::vector<Buffer> buffers = buffers_of(manifest, {capacity, chunk});
    return Ids{slots_of(buffers, 0), slots_of(buffers, 1), slots_of(buffers, 2), slots_of(buffers, 3)};
  };
  CHECK(slots(CAPACITY, 16) == (Ids{CAPACITY, NARROW + 16, WIDE + 16, CAPACITY}));
  CHECK(slots(CAPACITY, 1) == (Ids{CAPACITY, NARROW + 1, WIDE + 1, CAPACITY}));
  CHECK(slots(20, 16) == (Ids{20, 19, 20, 20}));  // a small cache holds all of its tokens
  CHECK(slots(2, 2) == (Ids{2, 2, 2, 2}));
  CHECK(slots(CAPACITY, std::numeric_limits<std::int64_t>::max()) == Ids(4, CAPACITY));
  manifest.eviction = Eviction{"window", 50, 2, 5, {0, 2}};
  CHECK(!manifest.ring_of(1) && manifest.ring_of(2) == WIDE);
  CHECK(slots(CAPACITY, 16) == (Ids{CAPACITY, 50, WIDE + 16, 50}));
}

TEST(memory_counts_rings_as_window_and_one_call) {
  constexpr std::size_t aligned = 256, number = sizeof(float);
  const auto bytes = [](std::int64_t heads, std::int64_t slots) {
    const std::size_t exact = static_cast<std::size_t>(heads * slots) * number;
    return 2 * ((exact + aligned - 1) / aligned * aligned);  // keys and values
  };
  const auto session = session_of();
  const std::int64_t chunk = 128;  // of the session
  CHECK_EQUAL(session->bytes_of(0), bytes(2, CAPACITY) + bytes(2, NARROW + chunk) + bytes(1, WIDE + chunk) +
                                        bytes(1, CAPACITY));
  CHECK_EQUAL(Cache(session, 0).bytes(), session->bytes_of(0));
  CHECK_EQUAL(session->bytes_of(100), bytes(2, 100) + bytes(2, 100) + bytes(1, 100) + bytes(1, 100));
  // An engine fixes the size of its rings, whatever the session's chunk is.
  const auto fixed = session_of(0, 16);
  const std::size_t of_engine =
      bytes(2, CAPACITY) + bytes(2, NARROW + 16) + bytes(1, WIDE + 16) + bytes(1, CAPACITY);
  CHECK_EQUAL(fixed->bytes_of(100), of_engine);
  CHECK_EQUAL(Cache(fixed, 100, 0, 5).bytes(), of_engine);
}

TEST(calls_end_where_a_ring_does) {
  HostStorage storage;
  const Buffers buffers(manifest_of(), {CAPACITY, 16}, storage, 0);
  constexpr std::int64_t first = NARROW + 16, second = WIDE + 16;
  for (std::int64_t position = 0; position < CAPACITY; ++position) {
    const std::int64_t room = std::min(first - position % first, second - position % second);
    CHECK(room > 0);
    for (const std::int64_t count : {1, 10, 16, 1000}) {
      // Before the first wrap a call may fill a ring; later ones must leave it the window.
      const std::int64_t most = position < first ? room : std::min<std::int64_t>(room, 16);
      CHECK_EQUAL(buffers.tokens_of_call(position, count), std::min(count, most));
    }
  }
  const Buffers whole(manifest_of(), {CAPACITY, CAPACITY}, storage, 0);  // rings that never wrap
  CHECK_EQUAL(whole.tokens_of_call(7, 150), 150);
}

TEST(growth_ends_at_the_size_of_a_ring) {
  HostStorage storage;
  Buffers buffers(manifest_of(), {CAPACITY, 16}, storage, 16);
  for (const std::int64_t tokens : {1, 17, 30, 100, 200}) {
    buffers.reserve(tokens);
    for (const Buffer& buffer : buffers.all)
      CHECK_EQUAL(buffer.slots, std::min(buffers.layout_tokens, buffer.max_slots));
  }
  Manifest windows = manifest_of();
  windows.layers = {windows.layers[1], windows.layers[2]};
  Buffers rings(windows, {CAPACITY, 16}, storage, 16);
  rings.reserve(WIDE + 16);
  CHECK_EQUAL(rings.layout_tokens, CAPACITY);  // there is nothing left to grow
}

TEST(moves_between_rings_keep_the_last_tokens) {
  CHECK(ring_moves(0, 4, 4).empty());
  CHECK(ring_moves(3, 3, 8) == (std::vector<Move>{{0, 0, 3}}));
  CHECK(ring_moves(10, 4, 4) == (std::vector<Move>{{2, 2, 2}, {0, 0, 2}}));
  CHECK(ring_moves(10, 4, 16) == (std::vector<Move>{{6, 2, 2}, {8, 0, 2}}));
  CHECK(ring_moves(10, 10, 4) == (std::vector<Move>{{2, 6, 2}, {0, 8, 2}}));
  for (std::int64_t length = 0; length < 40; ++length)
    for (std::int64_t source = 1; source < 12; ++source)
      for (std::int64_t target = 1; target < 12; ++target) {
        std::map<std::int64_t, std::int64_t> moved;  // source by target
        for (const Move& move : ring_moves(length, source, target)) {
          CHECK(move.slots > 0 && move.source + move.slots <= source && move.target + move.slots <= target);
          for (std::int64_t at = 0; at < move.slots; ++at) moved[move.target + at] = move.source + at;
        }
        const std::int64_t kept = std::min({length, source, target});
        CHECK_EQUAL(static_cast<std::int64_t>(moved.size()), kept);
        for (std::int64_t position = length - kept; position < length; ++position)
          CHECK_EQUAL(moved.at(position % target), position % source);
      }
}

TEST(every_query_sees_its_window) {
  for (const std::int64_t chunk : {1, 2, 5, 7, 16, 1000})
    for (const std::int64_t step : {0, 1, 4, 30})
      for (const std::int64_t ring_chunk : {0, 1, 7}) {  // also rings that calls of `chunk` tokens do not fit
        Cache cache(session_of(step), 0, 0, chunk, ring_chunk);
        cache.clear(1000);  // a token that does not exist
        require_continuation(cache, {});
      }
  Cache fixed(session_of(0, 16), 150);
  fixed.clear(1000);
  require_continuation(fixed, {});
  Cache small(session_of(), 40, 0, 16);
  require_continuation(small, {});
}

TEST(prompts_are_run_in_chunks_and_split_where_a_ring_ends) {
  const auto session = session_of();
  Cache cache(session, 0, 0, 16);
  const Ids prompt = tokens(60);
  require_logits(session->manifest(), cache.prefill(prompt.data(), prompt.size()), prompt);
  const auto& engine = dynamic_cast<const Counting&>(*session->engine);
  CHECK(engine.calls == (Ids{16, 3, 6, 13, 12, 7, 3}));  // rings of 19 and 25 slots end at 19, 25, 38, 50, 57
}

TEST(scores_of_every_token_see_their_window) {
  for (const std::int64_t chunk : {1, 7, 16}) {
    const auto session = session_of();
    Cache cache(session, 0, 0, chunk);
    const Ids text = tokens(90);
    const std::vector<float> scored = cache.score(text.data(), text.size(), 3);
    CHECK_EQUAL(scored.size(), static_cast<std::size_t>(VOCAB) * 87);
    for (std::size_t row = 0; row < 87; ++row)
      require_logits(session->manifest(), scored.data() + row * VOCAB,
                     Ids(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(row + 4)));
  }
}

TEST(saved_rings_are_loaded_into_rings_of_other_sizes) {
  const Folder folder;
  const std::string file = folder.file("cache");
  for (const std::size_t length : {1U, 2U, 10U, 19U, 26U, 100U})
    for (const std::int64_t chunk : {1, 5, 16, 1000}) {
      Cache saved(session_of(), 0, 0, chunk);
      saved.clear(1000);
      const Ids text = tokens(length);
      saved.prefill(text.data(), text.size());
      saved.save(file);
      const TensorReader reader(file);
      const auto slots = static_cast<std::int64_t>(length);
      for (const auto& [layer, window] : {std::pair(0, CAPACITY), {1, NARROW}, {2, WIDE}}) {
        const TensorEntry* entry =
            reader.header().find("past_key_values." + std::to_string(layer) + ".key");
        CHECK_EQUAL(entry->shape[2], std::min<std::int64_t>(slots, window));
      }
      for (const std::int64_t other : {1, 5, 16, 1000}) {
        Cache loaded(session_of(8), 0, 0, other);
        loaded.load(file);
        CHECK_EQUAL(loaded.length(), slots);
        require_logits(loaded.session().manifest(), loaded.prefill(nullptr, 0), text);
        require_continuation(loaded, text);
      }
      Cache fixed(session_of(0, 16), 0);
      fixed.load(file);
      require_continuation(fixed, text);
    }
}

TEST(refuses_saved_rings_that_lack_tokens_of_the_window) {
  const Folder folder;
  const std::string file = folder.file("cache");
  const auto save = [&](std::int64_t narrow, std::int64_t wide) {
    std::vector<TensorEntry> entries;
    const std::int64_t length = 30, slots[] = {length, narrow, wide, length};
    std::size_t bytes = 0;
    for (const Buffer& buffer : buffers_of(manifest_of(), {CAPACITY, 16})) {
      const std::int64_t saved = slots[buffer.layer];
      entries.push_back({buffer.past, "F32", {1, buffer.heads, saved, buffer.width}});
      bytes += static_cast<std::size_t>(buffer.heads * saved * buffer.width) * sizeof(float);
    }
    const std::string state =
        R"({"lengths": [30], "last": [1], "pending": [[]], "filled": null, "seen": null})";
    TensorWriter writer(file, std::move(entries),
                        {{"kvexport", "cache 1"}, {"bundle", std::string(64, '0')}, {"state", state}});
    const std::string zeros(bytes, '\0');
    writer.write(zeros.data(), zeros.size());
    writer.commit();
  };
  const auto load = [&] {
    Cache cache(session_of(), 0, 0, 16);
    cache.load(file);
  };
  for (const auto& [narrow, wide] : {std::pair(NARROW, WIDE), {NARROW + 1, 30}, {30, WIDE + 3}}) {
    save(narrow, wide);
    load();
  }
  for (const auto& [narrow, wide] : {std::pair(NARROW - 1, WIDE), {NARROW, WIDE - 1}, {NARROW, 31}, {0, 9}}) {
    save(narrow, wide);
    CHECK_THROWS_WITH(load(), "does not match its state");
  }
}
