// kvexport for C++17: a bundle runs inside your application, without Python and without torch.
//
//   kvexport::Session session("half");                        // read, checked, loaded; throws
//   kvexport::Error kvexport::Cache cache = session.new_cache(512);           // all the memory it will ever
//   take: cache.bytes() cache.generate(cache.turn("Once upon a time"), {}, [](std::int64_t, std::string_view
//   text) {
//     std::cout << text << std::flush;
//     return true;                                            // false stops
//   });
//
// A cache is one conversation; several share one session's weights, each used by one thread at a time,
// different ones by different threads at once. Nothing is allocated for a cache after it was made, but for an
// engine's temporary values. A call that is refused leaves its cache as it was. Link with kvexport::kvexport
// (CMake).
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvexport.h"

namespace kvexport {
using Ids = std::vector<std::int64_t>;

// What failed, the value that was found, the values that are allowed, and how to fix it; what() has all of
// them.
class Error : public std::exception {
 public:
  explicit Error(kvexport_error* error) : error_(error, kvexport_error_free) {}
  int code() const { return kvexport_error_code(error_.get()); }  // KVEXPORT_USAGE, ...
  const char* failed() const { return kvexport_error_part(error_.get(), KVEXPORT_FAILED); }
  const char* got() const { return kvexport_error_part(error_.get(), KVEXPORT_GOT); }
  const char* expected() const { return kvexport_error_part(error_.get(), KVEXPORT_EXPECTED); }
  const char* fix() const { return kvexport_error_part(error_.get(), KVEXPORT_FIX); }
  const char* what() const noexcept override { return kvexport_error_part(error_.get(), KVEXPORT_MESSAGE); }

 private:
  std::shared_ptr<kvexport_error> error_;
};

namespace detail {  // what the C ABI gives, with an owner
inline void check(kvexport_error* error) {
  if (error != nullptr) throw Error(error);
}
template <typename Object>
using Owned = std::unique_ptr<Object, void (*)(Object*)>;
template <typename Object, typename Call>
Owned<Object> made(void (*free)(Object*), Call call) {
  Object* object = nullptr;
  kvexport_error* error = call(&object);
  Owned<Object> owned(object, free);
  check(error);
  return owned;
}
template <typename Call>
Ids ids_of(Call call) {
  std::size_t count = 0;
  const auto ids = made(kvexport_ids_free, [&](auto out) { return call(out, &count); });
  return Ids(ids.get(), ids.get() + count);
}
}  // namespace detail

struct OpenOptions {
  std::string provider =
      "auto";  // "cpu", "cuda", "tensorrt"; "auto": an engine of the bundle that fits, else CUDA, else CPU
  int threads = 0;                                       // of one operator on the CPU; 0: one a core
  bool verify = true;                                    // hash the weights too; every other file always is
  std::int64_t chunk = 128;                              // the most tokens of a prompt in one call
  std::string text_library = "libonnxruntime-genai.so";  // by name or path; "": token ids only
};

struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  std::optional<double>
      temperature;  // 0: the likeliest token; above it they are drawn; none: 1 with top_k or top_p, else 0
  std::int64_t top_k = 0;               // draw from the K likeliest; 0: from all
  double top_p = 1;                     // ... that reach this probability
  std::optional<std::uint64_t> seed;    // makes draws repeatable (they are not those of Python)
  std::optional<Ids> stop_tokens;       // none: the model's own
  std::vector<std::string> stop_texts;  // end the text before them
};

enum class Finish { stop, length, capacity, callback };

// After one token, in the cache's memory until its next call.
struct Logits {
  const float* values;
  std::int64_t vocab_size;
  std::int64_t likeliest() const { return std::max_element(values, values + vocab_size) - values; }
};

// One conversation: the keys and values of its tokens. Move-only; keeps the session's weights alive.
class Cache {
 public:
  // The whole prompt, or what follows what the cache holds, which may be nothing; logits after the last
  // token.
  Logits prefill(const Ids& ids) {
    const float* values = nullptr;
    return detail::check(kvexport_prefill(cache_.get(), ids.data(), ids.size(), &values)),
           Logits{values, vocab_size_};
  }
  Logits step(std::int64_t token) {  // one more token
    const float* values = nullptr;
    return detail::check(kvexport_step(cache_.get(), token, &values)), Logits{values, vocab_size_};
  }
  // Prefill, then token after token. `on_token`, which may not use this cache, gets each with the characters
  // that it completes, and at the end token -1 with what was held back, if anything was; false ends it. Its
  // exceptions come out of here. The next call feeds the last token; without ids it just goes on.
  using OnToken = std::function<bool(std::int64_t token, std::string_view text)>;
  Finish generate(const Ids& ids, const GenerateOptions& options = {}, const OnToken& on_token = nullptr) {
    kvexport_generate_options raw = kvexport_generate_defaults();
    std::vector<const char*> texts;
    std::vector<std::size_t> sizes;
    for (const std::string& text : options.stop_texts)
      texts.push_back(text.data()), sizes.push_back(text.size());
    raw.max_new_tokens = options.max_new_tokens,
    raw.temperature = options.temperature.value_or(raw.temperature);
    raw.top_k = options.top_k, raw.top_p = options.top_p, raw.seeded = !!options.seed,
    raw.seed = options.seed.value_or(0);
    raw.own_stop_tokens = !options.stop_tokens, raw.stop_texts = texts.data();
    raw.stop_text_lengths = sizes.data(), raw.stop_text_count = texts.size();
    if (options.stop_tokens)
      raw.stop_tokens = options.stop_tokens->data(), raw.stop_token_count = options.stop_tokens->size();
    CallbackState guarded{on_token, nullptr};
    kvexport_on_token callback = on_token ? &CallbackState::call : nullptr;
    int finish = 0;
    detail::check(kvexport_generate(cache_.get(), ids.data(), ids.size(), &raw, callback, &guarded, &finish));
    if (guarded.thrown) std::rethrow_exception(guarded.thrown);
    return static_cast<Finish>(finish);
  }
  // A user's turn: in the model's chat template where the bundle has one, else the text itself; "" may begin
  // too, with BOS.
  Ids turn(const std::string& text, const std::string& system = "") const {
    const auto call = [&, first = system.empty() ? nullptr : system.data()](auto... o) {
      return kvexport_turn(cache_.get(), text.data(), text.size(), first, system.size(), o...);
    };
    return detail::ids_of(call);
  }
  void save(const std::string& file) {
    detail::check(kvexport_cache_save(cache_.get(), file.c_str()));
  }  // see Session::load
  void clear() {
    detail::check(kvexport_cache_clear(cache_.get()));
  }  // an empty conversation, in the same memory
  std::size_t bytes() const { return kvexport_cache_bytes(cache_.get()); }  // all that it ever takes
  std::int64_t length() const {
    return kvexport_cache_length(cache_.get());
  }  // so far; without one not fed yet
  std::int64_t capacity() const { return kvexport_cache_capacity(cache_.get()); }  // tokens at most

 private:
  friend class Session;
  struct CallbackState {
    const OnToken& callback;
    std::exception_ptr thrown;
    static int call(std::int64_t token, const char* text, std::size_t length, void* user) try {
      return static_cast<CallbackState*>(user)->callback(token, std::string_view(text, length)) ? 0 : 1;
    } catch (...) {
      static_cast<CallbackState*>(user)->thrown = std::current_exception();
      return 1;
    }
  };
  Cache(detail::Owned<kvexport_cache> cache, std::int64_t vocab_size)
      : cache_(std::move(cache)), vocab_size_(vocab_size) {}
  detail::Owned<kvexport_cache> cache_;
  std::int64_t vocab_size_;
};

// An opened bundle: the weights, and what runs them.
class Session {
 public:
  explicit Session(const std::string& bundle, const OpenOptions& options = {})
      : session_(nullptr, kvexport_close) {
    kvexport_open_options raw = kvexport_open_defaults();
    raw.provider = options.provider.c_str(), raw.threads = options.threads, raw.verify = options.verify;
    raw.chunk = options.chunk, raw.text_library = options.text_library.c_str();
    session_ =
        detail::made(kvexport_close, [&](auto out) { return kvexport_open(bundle.c_str(), &raw, out); });
  }
  Cache new_cache(std::int64_t capacity =
                      0) {  // empty, for as many tokens; 0: as many as the bundle, or its engine, can hold
    const auto call = [&](auto out) { return kvexport_cache_new(session_.get(), capacity, out); };
    return {detail::made(kvexport_cache_free, call), info().vocab_size};
  }
  // One that `save` wrote, here or in Python, of this very bundle: a long prompt is prefilled once.
  Cache load(const std::string& file, std::int64_t capacity = 0) {
    const auto call = [&](auto out) {
      return kvexport_cache_load(session_.get(), file.c_str(), capacity, out);
    };
    return {detail::made(kvexport_cache_free, call), info().vocab_size};
  }
  Ids encode(const std::string& text, bool special = true) const {
    return detail::ids_of(
        [&](auto... o) { return kvexport_encode(session_.get(), text.data(), text.size(), special, o...); });
  }
  std::string decode(const Ids& ids) const {
    std::size_t length = 0;
    const auto call = [&](auto out) {
      return kvexport_decode(session_.get(), ids.data(), ids.size(), out, &length);
    };
    return {detail::made(kvexport_text_free, call).get(), length};
  }
  kvexport_memory memory(std::int64_t capacity = 0) const {  // bytes of such a cache, and of the device
    kvexport_memory memory{sizeof(kvexport_memory), 0, "", 0, 0, 0, 0};
    detail::check(kvexport_session_memory(session_.get(), capacity, &memory));
    return memory;
  }
  const kvexport_info& info() const {
    return *kvexport_session_info(session_.get());
  }  // what was opened, and what runs it
  // Runs the bundle's reference vectors: does this machine compute what was validated? Returns the report
  // (JSON); throws Error with code KVEXPORT_GATE_FAILED where it does not, saying whether weights, engine,
  // precision or cache are at fault. Damaged files are KVEXPORT_USAGE, without a verdict; weights that
  // `verify` = false left out are hashed here.
  std::string self_test() const {
    return detail::made(kvexport_text_free, [&](auto out) { return kvexport_self_test(session_.get(), out); })
        .get();
  }

 private:
  detail::Owned<kvexport_session> session_;
};
}  // namespace kvexport
