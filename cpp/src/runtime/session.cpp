#include "runtime/session.hpp"

#include <algorithm>
#include <exception>
#include <future>
#include <utility>

#include "bundle/file.hpp"

namespace kvexport::detail {

namespace {

constexpr std::size_t LARGEST_TEXT = std::size_t{1} << 24;  // size limit of text.json in bytes
constexpr int MAX_THREADS = 1024;

// For "auto": a TensorRT engine of the bundle if one fits this machine, else CUDA, else the CPU. A damaged
// engine is an error, not a reason to use another provider.
std::unique_ptr<Engine> open_engine(const Bundle& bundle, const OpenOptions& options) {
  const std::string& provider = options.provider;
  if (provider == "tensorrt") return open_tensorrt(bundle, options.verify);
  if (provider == "cpu" || provider == "cuda") return open_onnxruntime(bundle, provider, options.threads);
  if (provider != "auto") {
    throw Failure(Code::usage, "the provider must be auto, cpu, cuda or tensorrt", provider);
  }
  const auto open_if_available = [](auto open) -> std::unique_ptr<Engine> {
    try {
      return open();
    } catch (const Failure& failure) {
      if (failure.code != Code::cannot_run_here) throw;
      return nullptr;
    }
  };
  std::unique_ptr<Engine> engine;
  if (has_engine(bundle)) engine = open_if_available([&] { return open_tensorrt(bundle, options.verify); });
  if (!engine) engine = open_if_available([&] { return open_onnxruntime(bundle, "cuda", options.threads); });
  return engine ? std::move(engine) : open_onnxruntime(bundle, "cpu", options.threads);
}

Bundle open_bundle(const std::string& path, const OpenOptions& options) {
  if (options.threads < 0 || options.threads > MAX_THREADS) {
    throw Failure(Code::usage, "threads must be 0 (one per core) to " + std::to_string(MAX_THREADS),
                  std::to_string(options.threads));
  }
  if (options.chunk < 1)
    throw Failure(Code::usage, "chunk must be at least 1", std::to_string(options.chunk));
  Bundle bundle = Bundle::open(path);
  bundle.verify_all(false);
  return bundle;
}

// Hashes the weights while they are loaded; a damaged file is reported rather than the failure it causes. A
// TensorRT engine contains its own weights.
std::unique_ptr<Engine> load(const Bundle& bundle, const OpenOptions& options) {
  const bool own = options.provider == "tensorrt" || (options.provider == "auto" && has_engine(bundle));
  const auto verify = [&bundle] { bundle.verify({data_file}); };
  std::future<void> hash_result;
  if (options.verify && !own) hash_result = std::async(std::launch::async, verify);
  std::unique_ptr<Engine> engine;
  std::exception_ptr exception;
  try {
    engine = open_engine(bundle, options);
  } catch (...) {
    exception = std::current_exception();
  }
  if (hash_result.valid()) hash_result.get();
  if (exception) std::rethrow_exception(exception);
  if (options.verify && own && engine->provider() != "tensorrt") verify();
  return engine;
}

}  // namespace

Session::Session(const std::string& path, const OpenOptions& options)
    : bundle(open_bundle(path, options)),
      engine(load(bundle, options)),
      chunk(options.chunk),
      verified(options.verify),
      device(engine->device_memory().name) {
  open_text(options.text_library);
}

Session::Session(Bundle verified_bundle, std::unique_ptr<Engine> loaded_engine)
    : bundle(std::move(verified_bundle)),
      engine(std::move(loaded_engine)),
      chunk(OpenOptions().chunk),
      verified(true),
      device(engine->device_memory().name) {
  open_text("");
}

std::int64_t Session::capacity_of(std::int64_t capacity) const {
  const std::int64_t maximum = engine->capacity();
  if (capacity == 0) return maximum;
  if (capacity > 0 && capacity <= maximum) return capacity;
  std::string fix = "build the bundle again with --capacity " + std::to_string(capacity) + " or more";
  if (maximum < manifest().capacity) {
    fix = "build the engine again with --capacity, at most " + std::to_string(manifest().capacity);
  }
  throw Failure(Code::usage,
                "the capacity of a cache must be 1 to " + std::to_string(maximum) + ", or 0 for the largest",
                std::to_string(capacity), "", capacity < 0 ? "" : fix);
}

std::int64_t Session::chunk_of(std::int64_t capacity, std::int64_t requested) const {
  const std::int64_t most =
      manifest().eviction ? std::min(capacity, manifest().eviction->chunk()) : capacity;
  return std::min({requested == 0 ? chunk : requested, engine->max_tokens_per_call(), most});
}

CacheSize Session::buffer_size(CacheSize size) const {
  if (!engine->has_fixed_capacity()) return size;
  return {engine->capacity(), engine->max_tokens_per_call()};
}

std::size_t Session::bytes_of(std::int64_t capacity) const {
  const std::int64_t tokens = capacity_of(capacity);
  return Buffers::bytes_for(manifest(), buffer_size({tokens, chunk_of(tokens)}));
}

// A missing tokenizer library is not an error: the session then works with token ids.
void Session::open_text(const std::string& library) {
  if (!manifest().has(text_file)) {
    text_missing = "the bundle " + bundle.path + " has no tokenizer";
  } else if (library.empty()) {
    text_missing = "the session was opened without a text library";
  } else {
    TextFile file = parse_text(read_file(bundle.file(text_file), LARGEST_TEXT),
                               std::string(text_file) + " of the bundle " + bundle.path);
    try {
      text = std::make_unique<Text>(bundle.path, std::move(file), library);
    } catch (const Failure& failure) {
      if (failure.code != Code::cannot_run_here) throw;
      text_missing = failure.failed;
      if (!failure.got.empty()) text_missing += ": " + failure.got;
      if (!failure.expected.empty()) text_missing += ", expected " + failure.expected;
      text_fix_ = failure.fix;
    }
  }
}

const Text& Session::require_text() const {
  if (text) return *text;
  throw Failure(Code::cannot_run_here, "this session must have a tokenizer for text", text_missing, "",
                text_fix_.empty() ? "use token ids, or provide a tokenizer: docs/embedding.md" : text_fix_);
}

void Session::require_ids(const std::int64_t* ids, std::size_t count) const {
  const std::int64_t vocab = manifest().vocab_size;
  const auto* wrong = std::find_if(ids, ids + count, [&](std::int64_t id) { return id < 0 || id >= vocab; });
  if (wrong == ids + count) return;
  throw Failure(Code::usage, "token ids must be inside the vocabulary", std::to_string(*wrong),
                "0 to " + std::to_string(vocab - 1));
}

std::vector<std::int64_t> Session::turn(const std::string& words, const std::optional<std::string>& system,
                                        bool begins) const {
  std::vector<std::int64_t> ids = require_text().turn(words, system, begins);
  if (ids.empty() && begins && manifest().bos_token_id) ids.push_back(*manifest().bos_token_id);
  return ids;
}

}  // namespace kvexport::detail
