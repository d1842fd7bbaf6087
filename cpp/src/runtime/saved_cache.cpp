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

// Shape of the first `tokens` slots of a buffer.
std::vector<std::int64_t> shape_of(const Buffer& buffer, std::int64_t tokens) {
  if (buffer.evicts) return {buffer.heads, 1, tokens, buffer.width};
  return {1, buffer.heads, tokens, buffer.width};
}

char* of_head(const Buffer& buffer, std::int64_t head) {
  return static_cast<char*>(buffer.address) +
         static_cast<std::size_t>(head * buffer.slots) * buffer.slot_bytes();
}

// Larger element sizes first, so that all tensors are aligned.
std::vector<Buffer> in_order(std::vector<Buffer> all) {
  std::stable_sort(all.begin(), all.end(), [](const Buffer& integer_of, const Buffer& other) {
    return size_of(integer_of.dtype) > size_of(other.dtype);
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
  return {Code::usage, "the saved cache " + file + " cannot be read: " + problem, std::move(got),
          std::move(expected), SAVE_AGAIN};
}

struct State {
  std::int64_t length = 0, last = 0, filled = 0, seen = 0;
  std::optional<std::int64_t> pending;
};

class StateReader {
 public:
  StateReader(const Metadata& metadata, const std::string& file, const Manifest& manifest)
      : file_(file), manifest_(manifest) {
    const auto find = [&](const char* key) {
      const auto item = metadata.find(key);
      return item == metadata.end() ? std::string() : item->second;
    };
    if (find("kvexport") != KIND) throw damaged(file, "its format is not supported", find("kvexport"), KIND);
    if (find("bundle") != manifest.digest) {
      throw Failure(Code::usage, "the saved cache " + file + " is of another bundle",
                    "manifest_sha256 " + find("bundle"), manifest.digest,
                    "load it with the bundle that it was saved with, or start with an empty cache");
    }
    raw_ = parse_json(find("state"), "the state of the saved cache " + file, SAVE_AGAIN);
  }

  // `slots`: slots of layers that evict.
  State read(std::int64_t slots) const {
    if (!raw_.is_object()) throw damaged(file_, "its state must be an object");
    for (const auto& [key, value] : raw_.items()) {
      if (std::find(std::begin(KEYS), std::end(KEYS), key) == std::end(KEYS)) {
        throw damaged(file_, "its state has an unknown key", for_message(key));
      }
    }
    State state;
    state.length = integer_of("lengths", 0, MOST);
    state.last = integer_of("last", 0, manifest_.vocab_size - 1);
    const Json& pending = list("pending").at(0);
    if (!pending.is_array() || pending.size() > 1)
      throw damaged(file_, "its pending tokens must be a list of at most one token");
    if (!pending.empty())
      state.pending = checked_integer("pending", pending.at(0), 0, manifest_.vocab_size - 1);
    if (manifest_.eviction) {
      state.seen = integer_of("seen", state.length, state.length);
      const std::int64_t maximum = std::min(state.length, slots);
      state.filled = integer_of("filled", std::min<std::int64_t>(1, maximum), maximum);
    } else {
      for (const char* key : {"filled", "seen"}) {
        const auto item = raw_.find(key);
        if (item == raw_.end() || !item->is_null()) {
          throw damaged(file_, std::string("its ") + key + " must be null, because no layer evicts");
        }
      }
    }
    return state;
  }

 private:
  static constexpr std::int64_t MOST = std::int64_t{1} << 40;
  static constexpr const char* KEYS[] = {"lengths", "last", "pending", "filled", "seen"};

  const Json& list(const char* key) const {
    const auto item = raw_.find(key);
    if (item == raw_.end() || !item->is_array() || item->empty()) {
      throw damaged(file_, std::string("its ") + key + " must be a list with one entry per sequence");
    }
    if (item->size() != 1) {
      throw damaged(file_, "it must hold one sequence", std::to_string(item->size()), "1");
    }
    return *item;
  }
  std::int64_t integer_of(const char* key, std::int64_t minimum, std::int64_t maximum) const {
    return checked_integer(key, list(key).at(0), minimum, maximum);
  }
  std::int64_t checked_integer(const char* key, const Json& value, std::int64_t minimum,
                               std::int64_t maximum) const {
    const std::string expected = std::to_string(minimum) + " to " + std::to_string(maximum);
    if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() > MOST) ||
        value.get<std::int64_t>() < minimum || value.get<std::int64_t>() > maximum) {
      throw damaged(file_, std::string("its ") + key + " is out of range", for_message(value), expected);
    }
    return value.get<std::int64_t>();
  }

  Json raw_;
  const std::string& file_;
  const Manifest& manifest_;
};

}  // namespace

void Cache::save(const std::string& file) const {
  require_intact();
  const Manifest& manifest = session_->manifest();
  std::vector<TensorEntry> tensors;
  const std::vector<Buffer> ordered = in_order(buffers_.all);
  for (const Buffer& buffer : ordered) {
    tensors.push_back({buffer.past, stored_as(buffer.dtype),
                       shape_of(buffer, buffer.evicts ? occupancy_.filled : length_)});
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
    row.resize(static_cast<std::size_t>(buffer.evicts ? occupancy_.filled : length_) * buffer.slot_bytes());
    if (row.empty()) continue;
    for (std::int64_t head = 0; head < buffer.heads; ++head) {
      buffers_.storage.download(row.data(), of_head(buffer, head), row.size());
      buffers_.storage.synchronize();
      writer.write(row.data(), row.size());
    }
  }
  writer.commit();
}

void Cache::load(const std::string& file) {
  const Manifest& manifest = session_->manifest();
  if (!size_of_file(file)) {
    throw Failure(Code::usage, "there is no saved cache " + file, "", "",
                  "name a file that was written by saving a cache");
  }
  const TensorReader reader(file);
  const std::int64_t slots =
      manifest.eviction ? std::min(manifest.eviction->budget, session_->engine->capacity()) : 0;
  const State state = StateReader(reader.header().metadata, file, manifest).read(slots);
  require_room(static_cast<std::uint64_t>(state.length),
               "the saved cache has more tokens than fit into the cache");
  if (reader.header().tensors.size() != buffers_.all.size()) {
    throw damaged(file, "the number of its tensors is wrong", std::to_string(reader.header().tensors.size()),
                  std::to_string(buffers_.all.size()));
  }
  for (const Buffer& buffer : buffers_.all) {
    const TensorEntry* entry = reader.header().find(buffer.past);
    const auto shape = shape_of(buffer, buffer.evicts ? state.filled : state.length);
    if (entry == nullptr) throw damaged(file, "the tensor " + buffer.past + " is missing");
    if (entry->dtype != stored_as(buffer.dtype) || entry->shape != shape) {
      throw damaged(file, "the tensor " + buffer.past + " does not match its state",
                    entry->dtype + " " + text_of(entry->shape),
                    stored_as(buffer.dtype) + (" " + text_of(shape)));
    }
  }
  reader.verify();
  clear();
  broken_ = true;  // until everything is read
  buffers_.reserve(std::max<std::int64_t>(1, state.length));
  std::vector<char> row;
  for (const Buffer& buffer : buffers_.all) {
    const TensorEntry& entry = *reader.header().find(buffer.past);
    row.resize(static_cast<std::size_t>(buffer.evicts ? state.filled : state.length) * buffer.slot_bytes());
    if (row.empty()) continue;
    for (std::int64_t head = 0; head < buffer.heads; ++head) {
      reader.read(entry, row.data(), row.size(), static_cast<std::uint64_t>(head) * row.size());
      buffers_.storage.upload(of_head(buffer, head), row.data(), row.size());
      buffers_.storage.synchronize();
    }
  }
  occupancy_ = {state.filled, state.seen};
  length_ = state.length, last_ = state.last, pending_ = state.pending;
  broken_ = false;
}

}  // namespace kvexport::detail
