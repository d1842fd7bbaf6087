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
  std::stable_sort(all.begin(), all.end(), [](const Buffer& one, const Buffer& other) {
    return size_of(one.dtype) > size_of(other.dtype);
  });
  return all;
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

Failure damaged(const std::string& file, const std::string& what, std::string got = {},
                std::string expected = {}) {
  return {Code::usage, "the saved cache " + file + " " + what, std::move(got), std::move(expected),
          "save it again, or begin with an empty cache"};
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
      const auto found = metadata.find(key);
      return found == metadata.end() ? std::string() : found->second;
    };
    if (find("kvexport") != KIND)
      throw damaged(file, "is no cache that this version reads", find("kvexport"), KIND);
    if (find("bundle") != manifest.digest) {
      throw Failure(Code::usage, "the saved cache " + file + " is of another bundle",
                    "manifest_sha256 " + find("bundle"), manifest.digest,
                    "load it with the bundle that it was saved with, or begin with an empty cache");
    }
    raw_ = parse_json(find("state"), "the state of the saved cache " + file,
                      "save it again, or begin with an empty cache");
  }

  State read() const {
    if (!raw_.is_object()) throw damaged(file_, "has a state that is no object");
    for (const auto& [key, value] : raw_.items()) {
      if (std::find(std::begin(KEYS), std::end(KEYS), key) == std::end(KEYS)) {
        throw damaged(file_, "has a state with a key that is none of a cache's", for_message(key));
      }
    }
    State state;
    state.length = one("lengths", 0, MOST);
    state.last = one("last", 0, manifest_.vocab_size - 1);
    const Json& pending = list("pending").at(0);
    if (!pending.is_array() || pending.size() > 1)
      throw damaged(file_, "has pending tokens that are no list of at most one");
    if (!pending.empty()) state.pending = whole("pending", pending.at(0), 0, manifest_.vocab_size - 1);
    if (manifest_.eviction) {
      state.seen = one("seen", state.length, state.length);
      const std::int64_t most = std::min(state.length, manifest_.eviction->budget);
      state.filled = one("filled", std::min<std::int64_t>(1, most), most);
    } else {
      for (const char* key : {"filled", "seen"}) {
        const auto found = raw_.find(key);
        if (found == raw_.end() || !found->is_null()) {
          throw damaged(
              file_, std::string("has a state whose ") + key + " is not null, and the bundle evicts nothing");
        }
      }
    }
    return state;
  }

 private:
  static constexpr std::int64_t MOST = std::int64_t{1} << 40;
  static constexpr const char* KEYS[] = {"lengths", "last", "pending", "filled", "seen"};

  const Json& list(const char* key) const {
    const auto found = raw_.find(key);
    if (found == raw_.end() || !found->is_array() || found->empty()) {
      throw damaged(file_, std::string("has a state without the list ") + key);
    }
    if (found->size() != 1) {
      throw damaged(file_, "holds several sequences, which this library does not take",
                    std::to_string(found->size()), "1");
    }
    return *found;
  }
  std::int64_t one(const char* key, std::int64_t least, std::int64_t most) const {
    return whole(key, list(key).at(0), least, most);
  }
  std::int64_t whole(const char* key, const Json& value, std::int64_t least, std::int64_t most) const {
    const std::string expected = std::to_string(least) + " to " + std::to_string(most);
    if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() > MOST) ||
        value.get<std::int64_t>() < least || value.get<std::int64_t>() > most) {
      throw damaged(file_, std::string("has a state whose ") + key + " is out of range", for_message(value),
                    expected);
    }
    return value.get<std::int64_t>();
  }

  Json raw_;
  const std::string& file_;
  const Manifest& manifest_;
};

}  // namespace

void Cache::save(const std::string& file) const {
  require_whole();
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
                  "name the file that a cache was saved to");
  }
  const TensorReader reader(file);
  const State state = StateReader(reader.header().metadata, file, manifest).read();
  require_room(static_cast<std::uint64_t>(state.length),
               "the saved cache holds more tokens than the cache has room for");
  if (reader.header().tensors.size() != buffers_.all.size()) {
    throw damaged(file, "has another number of tensors", std::to_string(reader.header().tensors.size()),
                  std::to_string(buffers_.all.size()));
  }
  for (const Buffer& buffer : buffers_.all) {
    const TensorEntry* entry = reader.header().find(buffer.past);
    const auto shape = shape_of(buffer, buffer.evicts ? state.filled : state.length);
    if (entry == nullptr) throw damaged(file, "lacks the tensor " + buffer.past);
    if (entry->dtype != stored_as(buffer.dtype) || entry->shape != shape) {
      throw damaged(file, "has another " + buffer.past + " than its state says",
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
