// The C API on top of Session, Cache and generate. No exception leaves it: every function that can fail
// catches all of them.
#include <kvexport/kvexport.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle/error.hpp"
#include "runtime/cache.hpp"
#include "runtime/generate.hpp"
#include "runtime/self_test.hpp"
#include "runtime/session.hpp"

using kvexport::detail::Code;
using kvexport::detail::Failure;

struct kvexport_error {
  const Failure* failure;  // null: out of memory
};

struct kvexport_session {
  std::shared_ptr<const kvexport::detail::Session> impl;
  kvexport_info info;
};

struct kvexport_cache {
  kvexport::detail::Cache impl;
};

namespace {

const kvexport_error OUT_OF_MEMORY{nullptr};
constexpr const char* OUT_OF_MEMORY_MESSAGE = "this machine must have enough free memory for the call";

kvexport_error* error_of(const Failure& failure) noexcept {
  try {
    auto copy = std::make_unique<const Failure>(failure);
    return new kvexport_error{copy.release()};
  } catch (...) {
    return const_cast<kvexport_error*>(&OUT_OF_MEMORY);
  }
}

template <typename Body>
kvexport_error* catch_errors(Body body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Failure& failure) {
      return error_of(failure);
    } catch (const std::bad_alloc&) {
      return const_cast<kvexport_error*>(&OUT_OF_MEMORY);
    } catch (const std::exception& other) {
      return error_of(Failure(Code::cannot_run_here, "an internal error occurred in kvexport", other.what()));
    }
  } catch (...) {
    return const_cast<kvexport_error*>(&OUT_OF_MEMORY);
  }
}

template <typename Pointer>
void require_not_null(const Pointer* pointer, const char* name) {
  if (pointer == nullptr) throw Failure(Code::usage, std::string(name) + " must not be NULL");
}

// An array may be NULL only if it is empty.
template <typename Value>
void require_array(const Value* values, std::size_t count, const char* name) {
  constexpr std::size_t most = PTRDIFF_MAX / sizeof(Value);
  if (count > most) {
    throw Failure(Code::usage,
                  std::string("the count of ") + name + " must be at most " + std::to_string(most),
                  std::to_string(count), "at most " + std::to_string(most));
  }
  if (count != 0) require_not_null(values, name);
}

std::string string_of(const char* text, std::size_t length, const char* name) {
  require_array(text, length, name);
  return length == 0 ? std::string() : std::string(text, length);
}

// Reads a struct of the caller, whose version may have fewer or more members than this library's.
template <typename Struct>
Struct read_struct(const Struct* source, Struct defaults) {
  if (source == nullptr) return defaults;
  std::size_t size = 0;
  std::memcpy(&size, source, sizeof size);
  if (size < sizeof size) {
    throw Failure(Code::usage, "the struct's size must be set", std::to_string(size),
                  std::to_string(sizeof(Struct)), "get the struct from its _defaults function");
  }
  std::memcpy(&defaults, source, std::min(size, sizeof(Struct)));
  return defaults;
}

template <typename Struct>
void write_struct(Struct* target, Struct values, const char* name) {
  require_not_null(target, name);
  if (target->size < sizeof target->size) {
    throw Failure(Code::usage, "the struct's size must be set", std::to_string(target->size),
                  std::to_string(sizeof(Struct)), std::string(name) + "->size = sizeof *" + name);
  }
  values.size = target->size;
  std::memcpy(target, &values, std::min(target->size, sizeof(Struct)));
}

void* allocate(std::size_t bytes) {
  void* memory = std::malloc(std::max<std::size_t>(bytes, 1));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void return_ids(const std::vector<std::int64_t>& source, std::int64_t** ids, std::size_t* count) {
  *ids = static_cast<std::int64_t*>(allocate(source.size() * sizeof(std::int64_t)));
  std::copy(source.begin(), source.end(), *ids);
  *count = source.size();
}

char* copy_text(const std::string& source) {
  auto* text = static_cast<char*>(allocate(source.size() + 1));
  std::memcpy(text, source.c_str(), source.size() + 1);
  return text;
}

kvexport::detail::Cache& require_unleased(kvexport_cache* cache) {
  require_not_null(cache, "cache");
  cache->impl.require_not_leased();
  return cache->impl;
}

kvexport_info info_of(const kvexport::detail::Session& session) {
  const kvexport::detail::Manifest& manifest = session.manifest();
  kvexport_info info{};
  info.source = manifest.source_name.c_str();
  info.dtype = name_of(manifest.dtype);
  info.provider = session.engine->provider().c_str();
  info.engine = session.engine->version().c_str();
  info.vocab_size = manifest.vocab_size;
  info.capacity = session.engine->capacity();
  info.budget = manifest.eviction ? std::min(manifest.eviction->budget, info.capacity) : 0;
  info.bos_token_id = manifest.bos_token_id.value_or(-1);
  info.eos_token_ids = manifest.eos_token_ids.data();
  info.eos_token_count = manifest.eos_token_ids.size();
  info.has_text = session.text ? 1 : 0;
  info.has_chat = session.text && session.text->chat() ? 1 : 0;
  info.text_missing = session.text_missing.c_str();
  return info;
}

kvexport::detail::GenerateOptions options_of(const kvexport_generate_options& raw) {
  kvexport::detail::GenerateOptions options;
  options.max_new_tokens = raw.max_new_tokens;
  options.sampling.temperature = raw.temperature;
  if (raw.temperature < 0) options.sampling.temperature = raw.top_k > 0 || raw.top_p < 1 ? 1 : 0;
  options.sampling.top_k = raw.top_k;
  options.sampling.top_p = raw.top_p;
  if (raw.seeded != 0) options.sampling.seed = raw.seed;
  if (raw.own_stop_tokens == 0) {
    require_array(raw.stop_tokens, raw.stop_token_count, "stop_tokens");
    options.stop_tokens.emplace();
    if (raw.stop_token_count != 0)
      options.stop_tokens->assign(raw.stop_tokens, raw.stop_tokens + raw.stop_token_count);
  }
  require_array(raw.stop_texts, raw.stop_text_count, "stop_texts");
  require_array(raw.stop_text_lengths, raw.stop_text_count, "stop_text_lengths");
  for (std::size_t index = 0; index < raw.stop_text_count; ++index) {
    options.stop_texts.push_back(
        string_of(raw.stop_texts[index], raw.stop_text_lengths[index], "stop_texts"));
  }
  return options;
}

}  // namespace

extern "C" {

int kvexport_error_code(const kvexport_error* error) {
  if (error == nullptr) return 0;
  return static_cast<int>(error->failure == nullptr ? Code::cannot_run_here : error->failure->code);
}

const char* kvexport_error_part(const kvexport_error* error, int part) {
  if (error == nullptr) return "";
  if (error->failure == nullptr)
    return part == KVEXPORT_MESSAGE || part == KVEXPORT_FAILED ? OUT_OF_MEMORY_MESSAGE : "";
  const Failure& failure = *error->failure;
  switch (part) {
    case KVEXPORT_MESSAGE: return failure.what();
    case KVEXPORT_FAILED: return failure.failed.c_str();
    case KVEXPORT_GOT: return failure.got.c_str();
    case KVEXPORT_EXPECTED: return failure.expected.c_str();
    case KVEXPORT_FIX: return failure.fix.c_str();
    default: return "";
  }
}

void kvexport_error_free(kvexport_error* error) {
  if (error == nullptr || error == &OUT_OF_MEMORY) return;
  delete error->failure;
  delete error;
}

const char* kvexport_version(void) { return KVEXPORT_VERSION; }

kvexport_open_options kvexport_open_defaults(void) {
  return {sizeof(kvexport_open_options), "auto", 0, 1, 128, "libonnxruntime-genai.so"};
}

kvexport_error* kvexport_open(const char* bundle, const kvexport_open_options* options,
                              kvexport_session** session) {
  return catch_errors([&] {
    require_not_null(bundle, "bundle");
    require_not_null(session, "session");
    const kvexport_open_options raw = read_struct(options, kvexport_open_defaults());
    require_not_null(raw.provider, "provider");
    require_not_null(raw.text_library, "text_library");
    const kvexport::detail::OpenOptions parsed{raw.provider, raw.threads, raw.verify != 0, raw.chunk,
                                               raw.text_library};
    auto impl = std::make_shared<const kvexport::detail::Session>(bundle, parsed);
    const kvexport_info info = info_of(*impl);
    *session = new kvexport_session{std::move(impl), info};
  });
}

void kvexport_close(kvexport_session* session) { delete session; }

const kvexport_info* kvexport_session_info(const kvexport_session* session) {
  return session == nullptr ? nullptr : &session->info;
}

kvexport_error* kvexport_session_memory(const kvexport_session* session, int64_t capacity,
                                        kvexport_memory* memory) {
  return catch_errors([&] {
    require_not_null(session, "session");
    const kvexport::detail::DeviceMemory device = session->impl->engine->device_memory();
    write_struct(memory,
                 {0, session->impl->bytes_of(capacity), session->impl->device.c_str(), device.free,
                  device.total, device.weights, device.activations},
                 "memory");
  });
}

kvexport_error* kvexport_encode(const kvexport_session* session, const char* text, size_t length, int special,
                                int64_t** ids, size_t* count) {
  return catch_errors([&] {
    require_not_null(session, "session");
    const std::string input = string_of(text, length, "text");
    require_not_null(ids, "ids");
    require_not_null(count, "count");
    return_ids(session->impl->require_text().encode(input, special != 0), ids, count);
  });
}

kvexport_error* kvexport_decode(const kvexport_session* session, const int64_t* ids, size_t count,
                                char** text, size_t* length) {
  return catch_errors([&] {
    require_not_null(session, "session");
    require_array(ids, count, "ids");
    require_not_null(text, "text");
    session->impl->require_ids(ids, count);
    const std::string decoded = session->impl->require_text().decode(
        count == 0 ? std::vector<std::int64_t>() : std::vector<std::int64_t>(ids, ids + count));
    *text = copy_text(decoded);
    if (length != nullptr) *length = decoded.size();
  });
}

kvexport_error* kvexport_turn(const kvexport_cache* cache, const char* text, size_t text_length,
                              const char* system, size_t system_length, int64_t** ids, size_t* count) {
  return catch_errors([&] {
    require_not_null(cache, "cache");
    const std::string input = string_of(text, text_length, "text");
    require_not_null(ids, "ids");
    require_not_null(count, "count");
    std::optional<std::string> system_prompt;
    if (system != nullptr || system_length != 0) system_prompt = string_of(system, system_length, "system");
    return_ids(cache->impl.session().turn(input, system_prompt, cache->impl.empty()), ids, count);
  });
}

void kvexport_ids_free(int64_t* ids) { std::free(ids); }

void kvexport_text_free(char* text) { std::free(text); }

kvexport_error* kvexport_cache_new(kvexport_session* session, int64_t capacity, kvexport_cache** cache) {
  return catch_errors([&] {
    require_not_null(session, "session");
    require_not_null(cache, "cache");
    *cache = new kvexport_cache{{session->impl, capacity}};
  });
}

kvexport_error* kvexport_cache_load(kvexport_session* session, const char* file, int64_t capacity,
                                    kvexport_cache** cache) {
  return catch_errors([&] {
    require_not_null(session, "session");
    require_not_null(file, "file");
    require_not_null(cache, "cache");
    std::unique_ptr<kvexport_cache> loaded(new kvexport_cache{{session->impl, capacity}});
    loaded->impl.load(file);
    *cache = loaded.release();
  });
}

kvexport_error* kvexport_cache_save(kvexport_cache* cache, const char* file) {
  return catch_errors([&] {
    kvexport::detail::Cache& impl = require_unleased(cache);
    require_not_null(file, "file");
    impl.save(file);
  });
}

kvexport_error* kvexport_cache_clear(kvexport_cache* cache) {
  return catch_errors([&] { require_unleased(cache).clear(); });
}

void kvexport_cache_free(kvexport_cache* cache) { delete cache; }

size_t kvexport_cache_bytes(const kvexport_cache* cache) {
  return cache == nullptr ? 0 : cache->impl.bytes();
}

int64_t kvexport_cache_length(const kvexport_cache* cache) {
  return cache == nullptr ? 0 : cache->impl.length();
}

int64_t kvexport_cache_capacity(const kvexport_cache* cache) {
  return cache == nullptr ? 0 : cache->impl.capacity();
}

kvexport_error* kvexport_prefill(kvexport_cache* cache, const int64_t* ids, size_t count,
                                 const float** logits) {
  return catch_errors([&] {
    kvexport::detail::Cache& impl = require_unleased(cache);
    require_array(ids, count, "ids");
    const float* values = impl.prefill(ids, count);
    if (logits != nullptr) *logits = values;
  });
}

kvexport_error* kvexport_step(kvexport_cache* cache, int64_t token, const float** logits) {
  return catch_errors([&] {
    const float* values = require_unleased(cache).step(token);
    if (logits != nullptr) *logits = values;
  });
}

kvexport_generate_options kvexport_generate_defaults(void) {
  return {sizeof(kvexport_generate_options), 128, -1, 0, 1, 0, 0, 1, nullptr, 0, nullptr, nullptr, 0};
}

kvexport_error* kvexport_generate(kvexport_cache* cache, const int64_t* ids, size_t count,
                                  const kvexport_generate_options* options, kvexport_on_token on_token,
                                  void* user, int* finish) {
  return catch_errors([&] {
    kvexport::detail::Cache& impl = require_unleased(cache);
    require_array(ids, count, "ids");
    const auto parsed = options_of(read_struct(options, kvexport_generate_defaults()));
    kvexport::detail::OnToken callback;
    if (on_token != nullptr) {
      callback = [&](std::int64_t token, std::string_view text) {
        return on_token(token, text.data(), text.size(), user) == 0;
      };
    }
    const auto reason = generate(impl, ids, count, parsed, callback);
    if (finish != nullptr) *finish = static_cast<int>(reason);
  });
}

kvexport_error* kvexport_self_test(const kvexport_session* session, char** report) {
  return catch_errors([&] {
    require_not_null(session, "session");
    require_not_null(report, "report");
    *report = nullptr;
    const kvexport::detail::SelfTestReport result = self_test(session->impl);
    *report = copy_text(result.json);
    if (!result.ok)
      throw Failure(Code::gate_failed, result.verdict + ": " + result.message, "", "", result.fix);
  });
}

}  // extern "C"
