// Inline definitions of kvexport.hpp, which includes this file. They call the C API only, so that an
// application may be compiled with another compiler than the library.
#pragma once

#include <utility>

namespace kvexport {

namespace detail {

inline void check(kvexport_error* error) {
  if (error != nullptr) throw Error(error);
}

template <typename Object>
using Owned = std::unique_ptr<Object, void (*)(Object*)>;

// Takes ownership of an object that a C function returns through a pointer.
template <typename Object, typename Call>
Owned<Object> take(void (*free)(Object*), Call call) {
  Object* object = nullptr;
  kvexport_error* error = call(&object);
  Owned<Object> owned(object, free);
  check(error);
  return owned;
}

template <typename Call>
Ids take_ids(Call call) {
  std::size_t count = 0;
  const auto ids = take(kvexport_ids_free, [&](auto out) { return call(out, &count); });
  return Ids(ids.get(), ids.get() + count);
}

// Passes tokens to a callback, and stores the exception that it throws.
struct Callback {
  const Cache::OnToken& on_token;
  std::exception_ptr exception;

  static int call(std::int64_t token, const char* text, std::size_t length, void* user) try {
    return static_cast<Callback*>(user)->on_token(token, std::string_view(text, length)) ? 0 : 1;
  } catch (...) {
    static_cast<Callback*>(user)->exception = std::current_exception();
    return 1;
  }
};

}  // namespace detail

inline Logits Cache::prefill(const Ids& ids) {
  const float* values = nullptr;
  detail::check(kvexport_prefill(cache_.get(), ids.data(), ids.size(), &values));
  return {values, vocab_size_};
}

inline Logits Cache::step(std::int64_t token) {
  const float* values = nullptr;
  detail::check(kvexport_step(cache_.get(), token, &values));
  return {values, vocab_size_};
}

inline Finish Cache::generate(const Ids& ids, const GenerateOptions& options, const OnToken& on_token) {
  std::vector<const char*> texts;
  std::vector<std::size_t> lengths;
  for (const std::string& text : options.stop_texts) {
    texts.push_back(text.data());
    lengths.push_back(text.size());
  }
  kvexport_generate_options raw = kvexport_generate_defaults();
  raw.max_new_tokens = options.max_new_tokens;
  raw.temperature = options.temperature.value_or(raw.temperature);
  raw.top_k = options.top_k;
  raw.top_p = options.top_p;
  raw.seeded = options.seed.has_value() ? 1 : 0;
  raw.seed = options.seed.value_or(0);
  raw.own_stop_tokens = options.stop_tokens.has_value() ? 0 : 1;
  if (options.stop_tokens) {
    raw.stop_tokens = options.stop_tokens->data();
    raw.stop_token_count = options.stop_tokens->size();
  }
  raw.stop_texts = texts.data();
  raw.stop_text_lengths = lengths.data();
  raw.stop_text_count = texts.size();
  detail::Callback callback{on_token, nullptr};
  int finish = 0;
  detail::check(kvexport_generate(cache_.get(), ids.data(), ids.size(), &raw,
                                  on_token ? &detail::Callback::call : nullptr, &callback, &finish));
  if (callback.exception) std::rethrow_exception(callback.exception);
  return static_cast<Finish>(finish);
}

inline Ids Cache::turn(const std::string& text, const std::string& system) const {
  return detail::take_ids([&](auto... out) {
    return kvexport_turn(cache_.get(), text.data(), text.size(), system.empty() ? nullptr : system.data(),
                         system.size(), out...);
  });
}

inline void Cache::save(const std::string& file) {
  detail::check(kvexport_cache_save(cache_.get(), file.c_str()));
}

inline void Cache::clear() { detail::check(kvexport_cache_clear(cache_.get())); }

inline std::size_t Cache::bytes() const { return kvexport_cache_bytes(cache_.get()); }

inline std::int64_t Cache::length() const { return kvexport_cache_length(cache_.get()); }

inline std::int64_t Cache::capacity() const { return kvexport_cache_capacity(cache_.get()); }

inline Session::Session(const std::string& bundle, const OpenOptions& options)
    : session_(nullptr, kvexport_close) {
  kvexport_open_options raw = kvexport_open_defaults();
  raw.provider = options.provider.c_str();
  raw.threads = options.threads;
  raw.verify = options.verify ? 1 : 0;
  raw.chunk = options.chunk;
  raw.text_library = options.text_library.c_str();
  session_ = detail::take(kvexport_close, [&](auto out) { return kvexport_open(bundle.c_str(), &raw, out); });
}

inline Cache Session::new_cache(std::int64_t capacity) {
  const auto call = [&](auto out) { return kvexport_cache_new(session_.get(), capacity, out); };
  return {detail::take(kvexport_cache_free, call), info().vocab_size};
}

inline Cache Session::load(const std::string& file, std::int64_t capacity) {
  const auto call = [&](auto out) {
    return kvexport_cache_load(session_.get(), file.c_str(), capacity, out);
  };
  return {detail::take(kvexport_cache_free, call), info().vocab_size};
}

inline Ids Session::encode(const std::string& text, bool special) const {
  return detail::take_ids([&](auto... out) {
    return kvexport_encode(session_.get(), text.data(), text.size(), special ? 1 : 0, out...);
  });
}

inline std::string Session::decode(const Ids& ids) const {
  std::size_t length = 0;
  const auto call = [&](auto out) {
    return kvexport_decode(session_.get(), ids.data(), ids.size(), out, &length);
  };
  return {detail::take(kvexport_text_free, call).get(), length};
}

inline kvexport_memory Session::memory(std::int64_t capacity) const {
  kvexport_memory memory{sizeof(kvexport_memory), 0, "", 0, 0, 0, 0};
  detail::check(kvexport_session_memory(session_.get(), capacity, &memory));
  return memory;
}

inline const kvexport_info& Session::info() const { return *kvexport_session_info(session_.get()); }

inline std::string Session::self_test() const {
  return detail::take(kvexport_text_free, [&](auto out) { return kvexport_self_test(session_.get(), out); })
      .get();
}

}  // namespace kvexport
