// A cache in a file, in the format of kvexport/runtime/cache/saved_cache.py. A file is checked completely
// before the cache is changed.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "bundle/json.hpp"
#include "bundle/safetensors.hpp"
#include "runtime/cache.hpp"

namespace kvexport::detail {

namespace {

constexpr const char* KIND = "cache 1";

const char* stored_as(Dtype dtype) {
  return dtype == Dtype::float32 ? "F32" : dtype == Dtype::float16 ? "F16" : "BF16";
}

// Shape of `slots` slots of a buffer.
std::vector<std::int64_t> shape_of(const Buffer& buffer, std::int64_t slots) {
  if (buffer.evicts) return {buffer.heads, 1, slots, buffer.width};
  return {1, buffer.heads, slots, buffer.width};
}

// Number of slots that a file has of a buffer: those in use. Of a ring it has at least those of its window,
// which `save` writes, and at most those of all tokens; the token at position p is in slot p modulo their
// number. `ring_slots`: those that a file has.
std::int64_t saved_slots(const Buffer& buffer, std::int64_t length, std::int64_t filled,
                         std::int64_t ring_slots = 0) {
  if (buffer.evicts) return filled;
  return buffer.ring ? std::clamp(ring_slots, std::min(*buffer.ring, length), length) : length;
}

std::size_t bytes_of(const Buffer& buffer, std::int64_t slots) {
  return static_cast<std::size_t>(slots) * buffer.slot_bytes();
}

char* address_of(const Buffer& buffer, std::int64_t head, std::int64_t slot) {
  return static_cast<char*>(buffer.address) + bytes_of(buffer, head * buffer.slots + slot);
}

// Larger element sizes first, so that all tensors are aligned.
std::vector<Buffer> in_order(std::vector<Buffer> all) {
  std::stable_sort(all.begin(), all.end(), [](const Buffer& left, const Buffer& right) {
    return size_of(left.dtype) > size_of(right.dtype);
  });
  return all;
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

constexpr const char* SAVE_AGAIN = "save it again, or start with an empty cache";

Failure damaged(const std::string& file, const std::string& problem, std::string got = {},
                std::string expected = {}) {
  return {Code::usage, "the saved cache " + file + " must be valid: " + problem, std::move(got),
          std::move(expected), SAVE_AGAIN};
}

struct State {
  std::int64_t length = 0, last = 0, filled = 0, seen = 0;
  std::optional<std::int64_t> pending;
};

constexpr std::int64_t MAX_LENGTH = (std::int64_t{1} << 62) - 1;

// The entry of the only sequence in a list with one entry per sequence.
std::int64_t only_integer(const Table& table, const char* key, std::int64_t maximum) {
  const std::vector<std::int64_t> values = table.integers(key, 0, maximum);
  if (values.size() != 1) table.fail(key, "one number for each sequence");
  return values[0];
}

// Reads the state of the sequence. `slots`: slots of layers that evict; none if no layer evicts.
// `require_room` checks the length.
template <typename RequireRoom>
State read_state(const Table& table, const std::string& file, std::int64_t vocab_size,
                 std::optional<std::int64_t> slots, RequireRoom require_room) {
  const std::vector<std::int64_t> lengths = table.integers("lengths", 0, MAX_LENGTH);
  if (lengths.empty()) table.fail("lengths", "one number for each sequence");
  if (lengths.size() != 1) {
    throw Failure(Code::usage, "the saved cache " + file + " must hold one sequence",
                  std::to_string(lengths.size()), "", "load it in Python, or save one sequence");
  }
  State state;
  state.length = lengths[0];
  require_room(state.length);
  state.last = only_integer(table, "last", vocab_size - 1);
  const Json& pending = table.list("pending");
  if (pending.size() != 1 || !pending[0].is_array() || pending[0].size() > 1)
    table.fail("pending", "a list of at most one token for each sequence");
  for (const Json& token : pending[0]) {
    if (!token.is_number_integer() || token < 0 || token >= vocab_size)
      table.fail("pending", "lists of integers from 0 to " + std::to_string(vocab_size - 1));
    state.pending = token.get<std::int64_t>();
  }
  if (slots) {
    state.filled = only_integer(table, "filled", MAX_LENGTH);
    state.seen = only_integer(table, "seen", MAX_LENGTH);
    if (state.seen != state.length) table.fail("seen", "the same numbers as lengths");
    if (state.filled > std::min(state.length, *slots) || (state.filled == 0) != (state.length == 0)) {
      table.fail("filled", "1 to " + std::to_string(*slots) +
                               " slots for each sequence with tokens, at most its length");
    }
  } else {
    for (const char* key : {"filled", "seen"})
      if (!table.is_null(key)) table.fail(key, "null, because no layer evicts");
  }
  table.only({"filled", "last", "lengths", "pending", "seen"});
  return state;
}

std::string value_of(const Metadata& metadata, const char* key) {
  const auto item = metadata.find(key);
  return item == metadata.end() ? std::string() : item->second;
}

}  // namespace

void Cache::save(const std::string& file) const {
  require_intact();
  const Manifest& manifest = session_->manifest();
  std::vector<TensorEntry> tensors;
  const std::vector<Buffer> ordered = in_order(buffers_.all);
  for (const Buffer& buffer : ordered) {
    tensors.push_back({buffer.past, stored_as(buffer.dtype),
                       shape_of(buffer, saved_slots(buffer, length_, occupancy_.filled))});
  }
  Json pending = Json::array();
  if (pending_) pending.push_back(*pending_);
  Json state{{"lengths", {length_}}, {"last", {last_}}, {"pending", Json::array({pending})}};
  state["filled"] = nullptr, state["seen"] = nullptr;
  if (manifest.eviction) state["filled"] = {occupancy_.filled}, state["seen"] = {occupancy_.seen};
  TensorWriter writer(file, std::move(tensors),
                      {{"kvexport", KIND}, {"bundle", manifest.digest}, {"state", state.dump()}});
  std::vector<char> row;
  for (const Buffer& buffer : ordered) {
    const std::int64_t slots = saved_slots(buffer, length_, occupancy_.filled);
    row.resize(bytes_of(buffer, slots));
    if (row.empty()) continue;
    const std::vector<Move> moves = ring_moves(buffer.evicts ? slots : length_, buffer.slots, slots);
    for (std::int64_t head = 0; head < buffer.heads; ++head) {
      for (const Move& move : moves) {
        buffers_.storage.download(row.data() + bytes_of(buffer, move.target),
                                  address_of(buffer, head, move.source), bytes_of(buffer, move.slots));
      }
      buffers_.storage.synchronize();
      writer.write(row.data(), row.size());
    }
  }
  writer.commit();
}

void Cache::load(const std::string& file) {
  const Manifest& manifest = session_->manifest();
  if (!size_of_file(file)) {
    throw Failure(Code::usage, "the saved cache " + file + " must be an existing file", "", "",
                  "name a file that was written by saving a cache");
  }
  const TensorReader reader(file);
  const Metadata& metadata = reader.header().metadata;
  if (value_of(metadata, "kvexport") != KIND)
    throw damaged(file, "its format is not supported", value_of(metadata, "kvexport"), KIND);
  if (value_of(metadata, "bundle") != manifest.digest) {
    throw Failure(Code::usage, "the saved cache " + file + " must be of this bundle",
                  value_of(metadata, "bundle"), manifest.digest,
                  "open the bundle that it was saved with, or start with an empty cache");
  }
  const std::string path = "the state of the saved cache " + file;
  const Json raw = parse_json(value_of(metadata, "state"), path, SAVE_AGAIN);
  std::optional<std::int64_t> slots;
  if (manifest.eviction) slots = std::min(manifest.eviction->budget, session_->engine->capacity());
  const auto require_length = [&](std::int64_t length) {
    require_room(static_cast<std::uint64_t>(length),
                 "the sequences of the saved cache must fit the capacity");
  };
  const State state =
      read_state(Table(raw, path, SAVE_AGAIN), file, manifest.vocab_size, slots, require_length);
  if (reader.header().tensors.size() != buffers_.all.size()) {
    throw damaged(file, "the number of its tensors is wrong", std::to_string(reader.header().tensors.size()),
                  std::to_string(buffers_.all.size()));
  }
  for (const Buffer& buffer : buffers_.all) {
    const TensorEntry* entry = reader.header().find(buffer.past);
    if (entry == nullptr) throw damaged(file, "the tensor " + buffer.past + " is missing");
    const std::int64_t in_file = entry->shape.size() == 4 ? entry->shape[2] : 0;
    const auto shape = shape_of(buffer, saved_slots(buffer, state.length, state.filled, in_file));
    if (entry->dtype != stored_as(buffer.dtype) || entry->shape != shape) {
      throw damaged(file, "the tensor " + buffer.past + " does not match its state",
                    entry->dtype + " " + text_of(entry->shape),
                    stored_as(buffer.dtype) + (" " + text_of(shape)));
    }
  }
  reader.verify();
  clear();
  failed_midway_ = true;  // until everything is read
  buffers_.reserve(std::max<std::int64_t>(1, state.length));
  std::vector<char> row;
  for (const Buffer& buffer : buffers_.all) {
    const TensorEntry& entry = *reader.header().find(buffer.past);
    const std::int64_t in_file = entry.shape[2];
    row.resize(bytes_of(buffer, in_file));
    if (row.empty()) continue;
    const std::vector<Move> moves = ring_moves(buffer.evicts ? in_file : state.length, in_file, buffer.slots);
    for (std::int64_t head = 0; head < buffer.heads; ++head) {
      reader.read(entry, row.data(), row.size(), static_cast<std::uint64_t>(head) * row.size());
      for (const Move& move : moves) {
        buffers_.storage.upload(address_of(buffer, head, move.target),
                                row.data() + bytes_of(buffer, move.source), bytes_of(buffer, move.slots));
      }
      buffers_.storage.synchronize();
    }
  }
  occupancy_ = {state.filled, state.seen};
  length_ = state.length, last_ = state.last, pending_ = state.pending;
  failed_midway_ = false;
}

}  // namespace kvexport::detail
