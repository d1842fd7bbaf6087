// TensorRT engines on a simulated GPU, for TensorRT 10.16 and (compiled with FAKE_TENSORRT_OLD) 10.3: results
// equal those of the CPU, steps allocate nothing, writes stay within the cache, and the right engine is
// chosen. KVEXPORT_TEST_ENGINES: directory written by tests/cpp/engine_bundles.py.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "../check.hpp"
#include "bundle/sha256.hpp"
#include "fake_cuda.hpp"
#include "runtime/cache.hpp"
#include "runtime/session.hpp"

using namespace kvexport::detail;
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr std::int64_t CAPACITY = 60, CHUNK = 16;

#ifdef FAKE_TENSORRT_OLD
const std::vector<std::string> BUNDLES{"decomposed17-old"};
const char* const VERSION = "tensorrt 10.3.0";
#else
const std::vector<std::string> BUNDLES{
    "std24",        "std24-evicting",        "std24-mixed",        "std24-half",        "std24-window",
    "decomposed17", "decomposed17-evicting", "decomposed17-mixed", "decomposed17-half",
    "decomposed17-window"};
const char* const VERSION = "tensorrt 10.16.2";
#endif
const std::string ANY = BUNDLES.front();

std::string engines(const std::string& name) { return check::given("KVEXPORT_TEST_ENGINES") + "/" + name; }

std::shared_ptr<Session> opened(const std::string& path, const char* provider = "tensorrt",
                                bool verify = true) {
  OpenOptions options;
  options.provider = provider, options.threads = 1, options.verify = verify;
  return std::make_shared<Session>(path, options);
}

std::vector<std::int64_t> tokens(std::size_t count, std::int64_t vocab, std::uint32_t seed = 1) {
  std::vector<std::int64_t> ids(count);
  for (std::int64_t& id : ids)
    id = static_cast<std::int64_t>((seed = seed * 1664525U + 1013904223U) >> 8U) % vocab;
  return ids;
}

using Rows = std::vector<std::vector<float>>;

// Logits after a prompt of several chunks, and after each of ten steps.
Rows rows_of(Cache& cache, std::uint32_t seed = 1, std::size_t prompt = 2 * CHUNK + 5,
             std::size_t steps = 10) {
  const std::int64_t vocab = cache.session().manifest().vocab_size;
  const std::vector<std::int64_t> ids = tokens(prompt + steps, vocab, seed);
  Rows rows;
  const auto keep = [&](const float* logits) { rows.emplace_back(logits, logits + vocab); };
  keep(cache.prefill(ids.data(), prompt));
  for (std::size_t index = prompt; index < ids.size(); ++index) keep(cache.step(ids[index]));
  return rows;
}

float difference(const Rows& left, const Rows& right) {
  float most = 0;
  for (std::size_t row = 0; row < left.size(); ++row)
    for (std::size_t at = 0; at < left[row].size(); ++at) {
      const float here = std::fabs(left[row][at] - right[row][at]);
      most = std::isnan(here) ? INFINITY : std::max(most, here);
    }
  return most;
}

float close_to(const std::string& bundle) { return bundle.find("half") == std::string::npos ? 1e-4F : 0.1F; }

Rows on_cpu(const std::string& bundle, std::uint32_t seed = 1) {
  Cache cache(opened(bundle, "cpu"), 0);
  return rows_of(cache, seed);
}

void require_nothing_left() {
  const fake_cuda::Counts left = fake_cuda::counts();
  CHECK_EQUAL(left.used + left.contexts + left.streams + left.graphs + left.pinned, std::size_t{0});
  CHECK_EQUAL(fake_cuda::broken(), std::string());
}

// A copy of a bundle that a test may change, removed by the destructor.
class Copy {
 public:
  explicit Copy(const std::string& name) {
    std::string folder = (fs::temp_directory_path() / "kvexport-gpu-XXXXXX").string();
    CHECK(mkdtemp(folder.data()) != nullptr);
    path = fs::path(folder) / name;
    fs::copy(engines(name), path, fs::copy_options::recursive);
  }
  ~Copy() { fs::remove_all(path.parent_path()); }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;

  fs::path engine() const { return path / "engines/simulated"; }
  // Changes the record, or the plan and its hash in the record.
  void record(const json& changes) const {
    json content = json::parse(std::ifstream(engine() / "build.json"));
    content.merge_patch(changes);
    std::ofstream(engine() / "build.json") << content;
  }
  void plan(const json& changes) const {
    json content = json::parse(std::ifstream(engine() / "decoder.plan"));
    content.merge_patch(changes);
    std::ofstream(engine() / "decoder.plan") << content.dump();
    record({{"plan", {{"sha256", sha256_of(content.dump())}, {"bytes", content.dump().size()}}}});
  }

  fs::path path;
};

// The message with which opening fails.
std::string refused(const fs::path& path, bool verify = true) {
  try {
    opened(path, "tensorrt", verify);
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "it was not refused";
}

bool has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::cout << "  not: " << part << "\n  but: " << text << std::endl;
  return false;
}

}  // namespace

TEST(prefill_and_decode_equal_the_cpu) {
  for (const std::string& name : BUNDLES) {
    fake_cuda::reset();
    const Rows expected = on_cpu(engines(name));
    {
      const auto session = opened(engines(name));
      CHECK_EQUAL(session->engine->provider(), std::string("tensorrt"));
      CHECK_EQUAL(session->engine->version(), std::string(VERSION));
      Cache cache(session, 0);
      CHECK_EQUAL(cache.capacity(), CAPACITY);
      CHECK(difference(rows_of(cache), expected) < close_to(name));
      cache.clear(1000.0F);  // again, with garbage in empty slots
      CHECK(difference(rows_of(cache), expected) < close_to(name));
    }
    require_nothing_left();
  }
}

TEST(every_row_of_a_prompt_equals_the_cpu) {
  for (const std::string& name : BUNDLES) {
    fake_cuda::reset();
    Cache here(opened(engines(name)), 0), there(opened(engines(name), "cpu"), CAPACITY);
    const std::vector<std::int64_t> ids = tokens(CAPACITY, here.session().manifest().vocab_size);
    CHECK(difference({here.score(ids.data(), ids.size())}, {there.score(ids.data(), ids.size())}) <
          close_to(name));
  }
}

TEST(cache_contents_equal_those_on_the_cpu) {
  for (const std::string& name : BUNDLES) {
    if (name.find("half") != std::string::npos) continue;
    fake_cuda::reset();
    Cache here(opened(engines(name)), 0), there(opened(engines(name), "cpu"), CAPACITY);
    rows_of(here), rows_of(there);
    for (int layer = 0; layer < 2; ++layer) {
      for (Which which : {Which::key, Which::value, Which::state}) {
        const Buffer *left = here.buffer(layer, which), *right = there.buffer(layer, which);
        CHECK((left == nullptr) == (right == nullptr));
        if (left == nullptr) continue;
        const std::vector<float> actual = here.read(*left), expected = there.read(*right);
        // Without eviction, the slots of the last tokens, of which a ring holds fewer than the length.
        const std::int64_t both = std::min(left->slots, right->slots),
                           stop = left->evicts ? both : here.length(), kept = std::min(both, stop);
        for (std::int64_t head = 0; head < left->heads; ++head)
          for (std::int64_t slot = stop - kept; slot < stop; ++slot)
            for (std::int64_t at = 0; at < left->width; ++at) {
              const auto of = [&](const Buffer& buffer) {
                return static_cast<std::size_t>(
                    (head * buffer.slots + slot % buffer.slots) * buffer.width + at);
              };
              CHECK(std::fabs(actual[of(*left)] - expected[of(*right)]) < 1e-4F);
            }
      }
    }
  }
}

TEST(decode_replays_one_graph_and_allocates_nothing) {
  for (const std::string& name : BUNDLES) {
    fake_cuda::reset();
    Cache cache(opened(engines(name)), 0);
    const std::vector<std::int64_t> ids = tokens(5, cache.session().manifest().vocab_size);
    cache.prefill(ids.data(), ids.size());
    fake_cuda::done();
    cache.step(1);  // TensorRT must run once before a capture
    for (const std::string& done : fake_cuda::done()) CHECK(done != "launch");
    const std::size_t allocations = fake_cuda::counts().allocations;
    const bool reads_slots = name.find("decomposed17-") == 0 && (name.find("evicting") != std::string::npos ||
                                                                 name.find("mixed") != std::string::npos);
    for (int step = 0; step < 5; ++step) {
      cache.step(2);
      std::vector<std::string> done = fake_cuda::done(), expected{"launch", "upload", "engine", "download"};
      if (reads_slots) expected.push_back("download");
      CHECK(std::equal(expected.begin(), expected.end(), done.begin()));
      const auto writes = static_cast<std::size_t>(std::count(done.begin(), done.end(), "copy_rows"));
      CHECK_EQUAL(writes + expected.size(), done.size());
      CHECK(name.find("std24") == 0 ? writes == 0 : writes >= 4);  // two per layer
    }
    cache.clear();
    rows_of(cache);
    CHECK_EQUAL(fake_cuda::counts().allocations, allocations);
  }
}

#ifndef FAKE_TENSORRT_OLD
TEST(engines_hold_only_the_window_and_one_call) {
  for (const char* name : {"std24-window", "decomposed17-window"}) {
    fake_cuda::reset();
    const auto session = opened(engines(name));
    Cache cache(session, 0, 0, 5);  // the engine fixes the number of slots
    const Manifest& manifest = session->manifest();
    CHECK(manifest.ring_of(0) == 5 && manifest.ring_of(1) == 5);
    for (const Which which : {Which::key, Which::value})
      CHECK_EQUAL(cache.buffer(1, which)->slots, *manifest.layers[1].window + CHUNK);
    CHECK(difference(rows_of(cache), on_cpu(engines(name))) < close_to(name));
    CHECK_EQUAL(fake_cuda::broken(), std::string());
    // An engine with another number of slots is refused.
    const Copy other(name);
    other.plan({{"chunk", CHUNK + 1}});
    CHECK(has(refused(other.path), "must match the bundle in past_key_values.0.key"));
  }
}

TEST(a_write_past_the_end_of_a_ring_is_detected) {  // by the simulation, which the tests above rely on
  fake_cuda::reset();
  const auto session = opened(engines("std24-window"));
  Buffers buffers(session->manifest(), {CAPACITY, CHUNK}, session->engine->storage(), 0);
  const auto binding = session->engine->bind(buffers);
  const std::int64_t slots = buffers.all[0].slots;
  const std::int64_t ids[] = {1, 1}, positions[] = {slots - 1, slots}, index = 0;
  CHECK_THROWS_WITH(session->engine->run(*binding, {ids, positions, 2, slots - 1, &index, 1}),
                    "past the end of a ring");
}
#endif

TEST(runs_without_graph_capture) {
  fake_cuda::reset();
  fake_cuda::settings().capturable = false;
  Cache cache(opened(engines(ANY)), 0);
  CHECK(difference(rows_of(cache), on_cpu(engines(ANY))) < 1e-4F);
  for (const std::string& done : fake_cuda::done()) CHECK(done != "launch");
}

TEST(comparisons_detect_an_incomplete_replay) {  // proves that the comparisons detect faults
  for (int operation : {0, 1, 2}) {
    fake_cuda::reset();
    fake_cuda::leave_out(operation);
    Cache cache(opened(engines(ANY)), 0);
    CHECK(difference(rows_of(cache), on_cpu(engines(ANY))) > 1e-2F);
  }
}

TEST(conversations_are_independent) {
  for (const std::string& name : BUNDLES) {
    fake_cuda::reset();
    {
      const auto session = opened(engines(name));
      const Rows first = on_cpu(engines(name), 3), second = on_cpu(engines(name), 4);
      Cache one(session, 0), two(session, 0);
      const std::int64_t vocab = session->manifest().vocab_size;
      const std::vector<std::int64_t> left = tokens(47, vocab, 3), right = tokens(47, vocab, 4);
      one.prefill(left.data(), 37), two.prefill(right.data(), 37);
      Rows of_one{first[0]}, of_two{second[0]};
      for (std::size_t index = 37; index < 47; ++index) {  // alternately
        const float* logits = one.step(left[index]);
        of_one.emplace_back(logits, logits + vocab);
        logits = two.step(right[index]);
        of_two.emplace_back(logits, logits + vocab);
      }
      CHECK(difference(of_one, first) < close_to(name) && difference(of_two, second) < close_to(name));
      one.clear(), two.clear();
      Rows found;
      std::thread other([&] { found = rows_of(one, 3); });  // at the same time
      CHECK(difference(rows_of(two, 4), second) < close_to(name));
      other.join();
      CHECK(difference(found, first) < close_to(name));
    }
    require_nothing_left();
  }
}

TEST(a_cache_outlives_session_and_other_caches) {
  fake_cuda::reset();
  {
    std::unique_ptr<Cache> second;
    {
      const auto session = opened(engines(ANY));
      Cache first(session, 0);
      second = std::make_unique<Cache>(session, 0);
      first.step(1);
    }
    CHECK(difference(rows_of(*second), on_cpu(engines(ANY))) < close_to(ANY));
  }
  require_nothing_left();
}

TEST(the_log_outlives_the_first_session) {
  fake_cuda::reset();
  auto first = opened(engines(ANY));
  const auto second = opened(engines(ANY));
  first.reset();
  Cache cache(second, 0);
  cache.step(1);
}

TEST(never_writes_beyond_the_capacity) {
  fake_cuda::reset();
  const auto session = opened(engines(ANY));
  Cache cache(session, 0);
  const std::vector<std::int64_t> ids = tokens(CAPACITY + 1, session->manifest().vocab_size);
  CHECK_THROWS_WITH(cache.prefill(ids.data(), ids.size()), "at most 60");
  cache.prefill(ids.data(), CAPACITY);
  CHECK_THROWS_WITH(cache.step(1), "must fit the capacity");
  // The bound of the engine itself.
  Buffers buffers(session->manifest(), {CAPACITY, CHUNK}, session->engine->storage(), 0);
  const auto binding = session->engine->bind(buffers);
  const std::int64_t id = 1, last = CAPACITY, index = 0;
  CHECK_THROWS_WITH(session->engine->run(*binding, {&id, &last, 1, last, &index, 1}),
                    "the tokens must fit the engine's capacity");
  CHECK_EQUAL(fake_cuda::broken(), std::string());
}

TEST(reports_memory_of_engine_and_driver) {
  fake_cuda::reset();
  const auto session = opened(engines(ANY));
  const DeviceMemory memory = session->engine->device_memory();
  CHECK_EQUAL(memory.name, std::string("Simulated 0"));
  CHECK_EQUAL(memory.activations, std::size_t{5000});
#ifdef FAKE_TENSORRT_OLD
  CHECK_EQUAL(memory.weights, std::size_t{0});  // not reported
#else
  CHECK_EQUAL(memory.weights, std::size_t{4096});
#endif
  CHECK_EQUAL(memory.free, memory.total - fake_cuda::counts().used);
  const std::size_t used = fake_cuda::counts().used;
  Cache cache(session, 0);
  CHECK(fake_cuda::counts().used >= used + cache.bytes());
}

TEST(out_of_memory_is_reported_and_releases_everything) {
  for (std::size_t total = 3000; total < 200000; total += 15000) {
    fake_cuda::reset();
    fake_cuda::settings().total = total;
    try {
      Cache cache(opened(engines(ANY)), 0);
      cache.step(1);
    } catch (const Failure& failure) {
      CHECK(failure.code == Code::cannot_run_here);
      CHECK(has(failure.what(), "memory"));
    }
    require_nothing_left();
  }
}

TEST(auto_selects_a_fitting_engine_or_falls_back) {
  fake_cuda::reset();
  CHECK_EQUAL(opened(engines(ANY), "auto")->engine->provider(), std::string("tensorrt"));
  fake_cuda::settings().devices = 0;
  CHECK_EQUAL(opened(engines(ANY), "auto")->engine->provider(), std::string("cpu"));
  CHECK(has(refused(engines(ANY)), "CUDA finds no GPU"));
  fake_cuda::reset();
  fake_cuda::settings().minor = 9;
  CHECK_EQUAL(opened(engines(ANY), "auto")->engine->provider(), std::string("cpu"));
}

TEST(lists_why_each_engine_does_not_fit) {
  fake_cuda::reset();
  const Copy bundle(ANY);
  const auto refusal = [&](const json& change) {
    const Copy changed(ANY);
    changed.record(change);
    return refused(changed.path);
  };
  CHECK(has(refusal({{"compute_capability", {"8.9", "12.0"}}}),
            "simulated was built for compute capability 8.9 or 12.0, and Simulated 0 has 8.7"));
  CHECK(has(refusal({{"version", "9.9.9"}}), "simulated was built with tensorrt 9.9.9, here is 10."));
  CHECK(has(refusal({{"engine", "tensorrt-rtx"}}), "simulated needs tensorrt-rtx"));
  CHECK(has(refusal({{"batch", 2}}), "simulated was built for 2 sequences"));
  CHECK(has(refusal({{"options", {{"refit", true}}}}), "without weights"));
  CHECK(has(refusal({{"options", {{"version_compatible", true}}}}), "contains host code"));
  CHECK(has(refusal({{"manifest_sha256", std::string(64, '0')}}), "must be built from this bundle"));
  bundle.record({{"compute_capability", {"8.6"}}, {"options", {{"hardware_compatible", true}}}});
  CHECK(opened(bundle.path) != nullptr);
  bundle.record({{"target", "first"}, {"batch", 2}});
  fs::rename(bundle.engine(), bundle.path / "engines/first");
  CHECK(has(refused(bundle.path), "first was built for 2 sequences"));
  fs::copy(engines(ANY) + "/engines/simulated", bundle.engine(), fs::copy_options::recursive);
  CHECK(opened(bundle.path) != nullptr);  // the second engine
  fs::remove_all(bundle.path / "engines");
  CHECK(has(refused(bundle.path), "must have an engine that this machine can run\n  got:      no engine"));
}

TEST(refuses_damaged_plans) {
  fake_cuda::reset();
  const Copy bundle(ANY);
  std::string plan;
  std::getline(std::ifstream(bundle.engine() / "decoder.plan"), plan);
  plan[0] = '[';
  std::ofstream(bundle.engine() / "decoder.plan") << plan;
  CHECK(has(refused(bundle.path), "sha256 differs"));
  CHECK(has(refused(bundle.path, false), "cannot load"));
  CHECK(has(refused(bundle.path, false), "magic tag does not match"));
  std::ofstream(bundle.engine() / "decoder.plan") << plan.substr(1);
  CHECK(has(refused(bundle.path, false), "must have the size in build.json"));
  require_nothing_left();
}

TEST(refuses_engines_that_contradict_their_record) {
  fake_cuda::reset();
  const auto refusal = [](const json& record, const json& plan) {
    const Copy changed(ANY);
    if (!plan.empty()) changed.plan(plan);
    if (!record.empty()) changed.record(record);
    return refused(changed.path);
  };
  CHECK(has(refusal({{"capacity", 50}}, {}), "must match the bundle in past_key_values.0.key"));
  CHECK(has(refusal({{"capacity", 50}}, {}), "60, "));
  CHECK(has(refusal({{"lowering", ANY == "std24" ? "decomposed17" : "std24"}}, {}),
            "must have the inputs and outputs of its lowering"));
  CHECK(has(refusal({}, {{"on_host", "logits"}}),
            "must have all tensors in device memory\n  got:      logits"));
#ifndef FAKE_TENSORRT_OLD
  CHECK(has(refusal({}, {{"apart", "present.1.value"}}), "must write the cache in place"));
#endif
  require_nothing_left();
}
