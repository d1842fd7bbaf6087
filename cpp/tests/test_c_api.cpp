// The C API and the C++ header: NULL arguments, structs of other sizes, threads, exceptions from callbacks,
// order of closing.
#include <kvexport/kvexport.hpp>

#include <array>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>

#include "check.hpp"

namespace {

using Error = std::unique_ptr<kvexport_error, void (*)(kvexport_error*)>;

Error error(kvexport_error* made) { return {made, kvexport_error_free}; }

std::string failed(kvexport_error* made) { return kvexport_error_part(error(made).get(), KVEXPORT_FAILED); }

// A bundle written by tests/cpp/bundles.py.
std::string bundle(const std::string& name) { return check::given("KVEXPORT_TEST_BUNDLES") + "/" + name; }

kvexport::Session opened(const std::string& name) {
  kvexport::OpenOptions options;
  options.provider = "cpu", options.threads = 1, options.text_library = "";
  return kvexport::Session(bundle(name), options);
}

kvexport::GenerateOptions greedy(std::int64_t tokens) {
  kvexport::GenerateOptions options;
  options.max_new_tokens = tokens, options.stop_tokens.emplace();
  return options;
}

kvexport::Ids generated(kvexport::Cache& cache, const kvexport::Ids& prompt, std::int64_t tokens) {
  kvexport::Ids made;
  cache.generate(prompt, greedy(tokens), [&](std::int64_t token, std::string_view) {
    made.push_back(token);
    return true;
  });
  return made;
}

const std::array<const char*, 4> NAMES{"gqa", "gqa-l2-norm", "bloom-evicting", "gqa-float16"};

}  // namespace

TEST(refuses_null_arguments) {
  kvexport_session* session = nullptr;
  kvexport_cache* cache = nullptr;
  char* text = nullptr;
  std::int64_t* ids = nullptr;
  std::size_t count = 0;
  CHECK_EQUAL(failed(kvexport_open(nullptr, nullptr, &session)), "bundle must not be NULL");
  CHECK_EQUAL(failed(kvexport_open("x", nullptr, nullptr)), "session must not be NULL");
  CHECK_EQUAL(failed(kvexport_cache_new(nullptr, 0, &cache)), "session must not be NULL");
  CHECK_EQUAL(failed(kvexport_cache_load(nullptr, "x", 0, &cache)), "session must not be NULL");
  CHECK_EQUAL(failed(kvexport_cache_save(nullptr, "x")), "cache must not be NULL");
  CHECK_EQUAL(failed(kvexport_cache_clear(nullptr)), "cache must not be NULL");
  CHECK_EQUAL(failed(kvexport_prefill(nullptr, nullptr, 0, nullptr)), "cache must not be NULL");
  CHECK_EQUAL(failed(kvexport_step(nullptr, 0, nullptr)), "cache must not be NULL");
  CHECK_EQUAL(failed(kvexport_generate(nullptr, nullptr, 0, nullptr, nullptr, nullptr, nullptr)),
              "cache must not be NULL");
  CHECK_EQUAL(failed(kvexport_encode(nullptr, "x", 1, 1, &ids, &count)), "session must not be NULL");
  CHECK_EQUAL(failed(kvexport_decode(nullptr, nullptr, 0, &text, &count)), "session must not be NULL");
  CHECK_EQUAL(failed(kvexport_turn(nullptr, "x", 1, nullptr, 0, &ids, &count)), "cache must not be NULL");
  CHECK_EQUAL(failed(kvexport_session_memory(nullptr, 0, nullptr)), "session must not be NULL");
  CHECK_EQUAL(failed(kvexport_self_test(nullptr, &text)), "session must not be NULL");
  CHECK(kvexport_session_info(nullptr) == nullptr);
  CHECK_EQUAL(kvexport_cache_bytes(nullptr), 0U);
  CHECK_EQUAL(kvexport_cache_length(nullptr), 0);
  CHECK_EQUAL(kvexport_cache_capacity(nullptr), 0);
  kvexport_close(nullptr);
  kvexport_cache_free(nullptr);
  kvexport_error_free(nullptr);
  kvexport_ids_free(nullptr);
  kvexport_text_free(nullptr);
  CHECK_EQUAL(kvexport_error_code(nullptr), 0);
  CHECK_EQUAL(std::string(kvexport_error_part(nullptr, KVEXPORT_FIX)), "");
}

TEST(an_error_has_all_parts) {
  const kvexport_open_options options = kvexport_open_defaults();
  kvexport_session* session = nullptr;
  const Error made = error(kvexport_open("/nowhere", &options, &session));
  CHECK(session == nullptr);
  CHECK_EQUAL(kvexport_error_code(made.get()), static_cast<int>(KVEXPORT_USAGE));
  CHECK_EQUAL(std::string(kvexport_error_part(made.get(), KVEXPORT_FIX)),
              "make one: kvexport build CHECKPOINT -o /nowhere");
  CHECK_EQUAL(std::string(kvexport_error_part(made.get(), 99)), "");
  const std::string whole = kvexport_error_part(made.get(), KVEXPORT_MESSAGE);
  CHECK(whole.find("must be a bundle") != std::string::npos &&
        whole.find("\n  fix:      make one") != std::string::npos);
  CHECK_EQUAL(std::string(kvexport_version()), KVEXPORT_VERSION);
}

TEST(accepts_structs_of_other_versions) {
  const std::string path = bundle("gqa");
  struct {
    kvexport_open_options known = kvexport_open_defaults();
    std::array<char, 64> unknown{};
  } later;
  later.known.size = sizeof later, later.known.threads = 1, later.known.text_library = "";
  kvexport_session* session = nullptr;
  CHECK(kvexport_open(path.c_str(), &later.known, &session) == nullptr);
  const std::unique_ptr<kvexport_session, void (*)(kvexport_session*)> owned(session, kvexport_close);

  kvexport_open_options earlier = kvexport_open_defaults();
  earlier.size = offsetof(kvexport_open_options, chunk), earlier.chunk = -5,
  earlier.text_library = nullptr;  // behind the struct's size, so ignored
  kvexport_session* other = nullptr;
  CHECK(kvexport_open(path.c_str(), &earlier, &other) == nullptr);
  kvexport_close(other);
  earlier.size = 0;
  CHECK_EQUAL(failed(kvexport_open(path.c_str(), &earlier, &other)), "the struct's size must be set");

  kvexport_memory memory{};
  CHECK_EQUAL(failed(kvexport_session_memory(session, 0, &memory)), "the struct's size must be set");
  std::memset(&memory, 0x7f, sizeof memory);
  memory.size = offsetof(kvexport_memory, device);
  CHECK(kvexport_session_memory(session, 10, &memory) == nullptr);
  CHECK(memory.cache_bytes > 0 && memory.cache_bytes < 10000 &&
        memory.size == offsetof(kvexport_memory, device));
  CHECK_EQUAL(memory.activations & 0xff, 0x7fU);  // unchanged behind the caller's size
}

TEST(generates_without_options_or_callback) {
  kvexport::Session session = opened("gqa");
  kvexport_open_options options = kvexport_open_defaults();
  options.text_library = "", options.threads = 1;
  kvexport_session* raw = nullptr;
  CHECK(kvexport_open(bundle("gqa").c_str(), &options, &raw) == nullptr);
  kvexport_cache* cache = nullptr;
  CHECK(kvexport_cache_new(raw, 60, &cache) == nullptr);
  const std::int64_t ids[] = {1, 2, 3};
  CHECK_EQUAL(failed(kvexport_prefill(cache, nullptr, 3, nullptr)), "ids must not be NULL");
  CHECK(kvexport_generate(cache, ids, 3, nullptr, nullptr, nullptr, nullptr) == nullptr);
  CHECK(kvexport_cache_length(cache) > 3);
  kvexport_generate_options raw_options = kvexport_generate_defaults();
  raw_options.own_stop_tokens = 0, raw_options.stop_token_count = 1;
  CHECK_EQUAL(failed(kvexport_generate(cache, ids, 3, &raw_options, nullptr, nullptr, nullptr)),
              "stop_tokens must not be NULL");
  raw_options = kvexport_generate_defaults(), raw_options.stop_text_count = 1;
  CHECK_EQUAL(failed(kvexport_generate(cache, ids, 3, &raw_options, nullptr, nullptr, nullptr)),
              "stop_texts must not be NULL");
  const char* const text = "x";
  raw_options.stop_texts = &text;
  CHECK_EQUAL(failed(kvexport_generate(cache, ids, 3, &raw_options, nullptr, nullptr, nullptr)),
              "stop_text_lengths must not be NULL");
  kvexport_close(raw);  // the cache shares the weights
  CHECK(kvexport_cache_clear(cache) == nullptr);
  CHECK(kvexport_prefill(cache, ids, 3, nullptr) == nullptr);
  kvexport_cache_free(cache);
}

TEST(an_exception_of_a_callback_is_rethrown_and_the_cache_stays_usable) {
  kvexport::Session session = opened("gqa");
  kvexport::Cache cache = session.new_cache(100), other = session.new_cache(100);
  const kvexport::Ids whole = generated(other, {1, 2, 3}, 10);
  int tokens_seen = 0;
  CHECK_THROWS_WITH(cache.generate({1, 2, 3}, greedy(10),
                                   [&](std::int64_t, std::string_view) -> bool {
                                     if (++tokens_seen == 4) throw std::runtime_error("enough");
                                     return true;
                                   }),
                    "enough");
  CHECK(generated(cache, {}, 6) == kvexport::Ids(whole.begin() + 4, whole.end()));
}

TEST(a_callback_cannot_use_the_generating_cache) {
  kvexport::Session session = opened("gqa");
  kvexport::Cache cache = session.new_cache(100), other = session.new_cache(100);
  const kvexport::Ids whole = generated(other, {1, 2, 3}, 10);
  const std::function<void()> calls[] = {
      [&] { cache.step(1); }, [&] { cache.prefill({1}); },  [&] { cache.generate({1}); },
      [&] { cache.clear(); }, [&] { cache.save("never"); },
  };
  kvexport::Ids made;
  cache.generate({1, 2, 3}, greedy(10), [&](std::int64_t token, std::string_view) {
    made.push_back(token);
    for (const auto& call : calls) {
      try {
        call();
        CHECK(false);
      } catch (const kvexport::Error& refused) {
        CHECK_EQUAL(std::string(refused.failed()),
                    "the cache must not be used by another call while it generates");
        CHECK_EQUAL(std::string(refused.fix()), "end the generation first: return false from on_token");
        CHECK_EQUAL(refused.code(), static_cast<int>(KVEXPORT_USAGE));
      }
    }
    return other.length() > 0;  // other caches may be used
  });
  CHECK(made == whole);
  cache.clear();  // and the same cache after the generation, however it ended
  CHECK_THROWS_WITH(
      cache.generate({1}, greedy(4),
                     [](std::int64_t, std::string_view) -> bool { throw std::logic_error("x"); }),
      "x");
  cache.clear();
  CHECK(generated(cache, {1, 2, 3}, 10) == whole);
}

TEST(refuses_impossible_counts) {
  const kvexport::Session session = opened("gqa");
  kvexport_open_options options = kvexport_open_defaults();
  options.text_library = "", options.threads = 1;
  kvexport_session* raw = nullptr;
  kvexport_cache* cache = nullptr;
  CHECK(kvexport_open(bundle("gqa").c_str(), &options, &raw) == nullptr);
  CHECK(kvexport_cache_new(raw, 60, &cache) == nullptr);
  const std::int64_t id = 1;
  const float* logits = nullptr;
  const auto none = static_cast<std::size_t>(-1);
  const std::string failure =
      "the count of ids must be at most " + std::to_string(PTRDIFF_MAX / sizeof(std::int64_t));
  for (const std::size_t count : {none, none - 1, none / 2, none / 8}) {
    CHECK_EQUAL(failed(kvexport_prefill(cache, &id, count, &logits)), failure);
    CHECK_EQUAL(failed(kvexport_generate(cache, &id, count, nullptr, nullptr, nullptr, nullptr)), failure);
  }
  for (const std::size_t count : {none / 32, std::size_t{61}}) {  // refused before the ids are read
    const Error refused = error(kvexport_prefill(cache, &id, count, &logits));
    CHECK_EQUAL(std::string(kvexport_error_part(refused.get(), KVEXPORT_GOT)),
                std::to_string(count) + " tokens");
    CHECK_EQUAL(kvexport_error_code(refused.get()), static_cast<int>(KVEXPORT_USAGE));
    CHECK(error(kvexport_generate(cache, &id, count, nullptr, nullptr, nullptr, nullptr)) != nullptr);
  }
  kvexport_generate_options raw_options = kvexport_generate_defaults();
  raw_options.own_stop_tokens = 0, raw_options.stop_tokens = &id, raw_options.stop_token_count = none;
  CHECK_EQUAL(
      failed(kvexport_generate(cache, &id, 1, &raw_options, nullptr, nullptr, nullptr)),
      "the count of stop_tokens must be at most " + std::to_string(PTRDIFF_MAX / sizeof(std::int64_t)));
  CHECK(logits == nullptr && kvexport_cache_length(cache) == 0);
  CHECK(kvexport_prefill(cache, &id, 1, &logits) == nullptr);
  CHECK(logits != nullptr);
  kvexport_cache_free(cache);
  kvexport_close(raw);
}

TEST(stop_texts_have_lengths) {
  kvexport::Session session = opened("gqa");
  kvexport::Cache cache = session.new_cache(60);
  kvexport::GenerateOptions options = greedy(4);
  options.stop_texts = {std::string("a\0b", 3)};
  CHECK_THROWS_WITH(cache.generate({1}, options), "a stop text must not contain a NUL character");
  CHECK_EQUAL(cache.length(), 0);
}

TEST(errors_can_be_copied) {
  kvexport::Session session = opened("gqa");
  kvexport::Cache cache = session.new_cache(4);
  try {
    cache.prefill({1, 99});
    CHECK(false);
  } catch (const kvexport::Error& thrown) {
    const kvexport::Error copy = thrown;
    CHECK_EQUAL(std::string(copy.got()), "99");
    CHECK_EQUAL(std::string(copy.expected()), "0 to 39");
    CHECK_EQUAL(copy.code(), static_cast<int>(KVEXPORT_USAGE));
  }
}

TEST(two_sessions_run_in_parallel_threads) {
  for (const char* name : NAMES) {
    kvexport::Session one = opened(name), two = opened(name);
    std::vector<kvexport::Ids> alone, together(6);
    for (std::int64_t prompt = 0; prompt < 6; ++prompt) {
      kvexport::Cache cache = one.new_cache();
      alone.push_back(
          generated(cache, kvexport::Ids(static_cast<std::size_t>(30 + 40 * prompt), prompt + 1), 60));
    }
    std::vector<std::thread> threads;
    for (std::int64_t prompt = 0; prompt < 6; ++prompt) {
      threads.emplace_back([&, prompt] {
        kvexport::Cache cache = (prompt % 2 == 0 ? one : two).new_cache();
        for (int round = 0; round < 3; ++round) {
          cache.clear();
          together[static_cast<std::size_t>(prompt)] =
              generated(cache, kvexport::Ids(static_cast<std::size_t>(30 + 40 * prompt), prompt + 1), 60);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(alone == together);
  }
}

TEST(opens_and_closes_a_hundred_times) {
  for (int round = 0; round < 100; ++round) {
    kvexport::Session session = opened("gqa-l2-norm");
    kvexport::Cache cache = session.new_cache(50);
    CHECK_EQUAL(cache.prefill({1, 2, 3}).vocab_size, 40);
  }
}
