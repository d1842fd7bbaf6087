// An open bundle: verified files, a loaded graph or engine, and a tokenizer if there is one. Shared by
// caches; immutable, and usable from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bundle/bundle.hpp"
#include "bundle/error.hpp"
#include "bundle/manifest.hpp"
#include "engines/engine.hpp"
#include "runtime/buffers.hpp"
#include "text/text.hpp"

namespace kvexport::detail {

struct OpenOptions {
  std::string provider = "auto";  // or "cpu", "cuda", "tensorrt"
  int threads = 0;                // CPU threads per operator; 0: one per core
  bool verify = true;             // hash the weights, or the plan if a TensorRT engine is used
  std::int64_t chunk = 128;  // largest number of prompt tokens per call; engines and eviction may lower it
  std::string text_library;  // "": token ids only
};

class Session {
 public:
  // Throws Failure if there is no bundle or it is damaged, an option is out of range, or this machine lacks
  // what the provider needs.
  Session(const std::string& path, const OpenOptions& options);
  // For a bundle whose files are already verified, and any engine; token ids only.
  Session(Bundle bundle, std::unique_ptr<Engine> engine);

  const Manifest& manifest() const { return bundle.manifest; }
  // Capacity of a cache for which `capacity` is requested; 0: the largest. Throws Failure if it is out of
  // range.
  std::int64_t capacity_of(std::int64_t capacity) const;
  // Largest number of tokens of one call in a cache of `capacity` tokens. `requested`: 0: the session's.
  std::int64_t chunk_of(std::int64_t capacity, std::int64_t requested = 0) const;
  // Size of the buffers of a cache for `size`: an engine may fix it.
  CacheSize buffer_size(CacheSize size) const;
  std::size_t bytes_of(std::int64_t capacity) const;
  // Throws Failure if a token id is outside the vocabulary.
  void require_ids(const std::int64_t* ids, std::size_t count) const;
  // As Text::turn; if that gives no tokens at the start of a conversation, the BOS token, if the model has
  // one.
  std::vector<std::int64_t> turn(const std::string& words, const std::optional<std::string>& system,
                                 bool begins) const;
  // Throws Failure if the session has no tokenizer, with the reason.
  const Text& require_text() const;

  const Bundle bundle;
  const std::unique_ptr<Engine> engine;
  const std::int64_t chunk;
  const bool verified;  // the weights that run were hashed
  std::unique_ptr<const Text> text;
  std::string text_missing;  // why there is no tokenizer; "" if there is one
  const std::string device;  // name of the GPU, "" on the CPU

 private:
  void open_text(const std::string& library);
  std::string text_fix_;
};

}  // namespace kvexport::detail
