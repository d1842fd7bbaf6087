// An opened bundle: its files checked, its graph or engine loaded, its tokenizer where there is one. What
// caches share; nothing in it changes once it is open, so that any thread may use it.
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
#include "text/text.hpp"

namespace kvexport::detail {

struct OpenOptions {
  std::string provider = "auto";  // or "cpu", "cuda", "tensorrt"
  int threads = 0;                // of one operator on the CPU; 0: one a core
  bool verify = true;             // hash the weights too (an engine's plan, where it is that which runs)
  std::int64_t chunk =
      128;  // the most tokens of a prompt in one call; an engine may take fewer, and layers that evict do
  std::string text_library;  // "": token ids only
};

class Session {
 public:
  // Throws Failure: no bundle, a damaged one, an option out of range, or this machine lacks what the provider
  // needs.
  Session(const std::string& path, const OpenOptions& options);
  // Of a bundle whose files are checked, on any engine; token ids only.
  Session(Bundle bundle, std::unique_ptr<Engine> engine);

  const Manifest& manifest() const { return bundle.manifest; }
  // Of a cache that is asked to have room for `capacity` tokens, 0: for as many as can be. Throws Failure:
  // out of range.
  std::int64_t capacity_of(std::int64_t capacity) const;
  std::size_t bytes_of(std::int64_t capacity) const;
  // Throws Failure: a token id is outside the vocabulary.
  void require_ids(const std::int64_t* ids, std::size_t count) const;
  // Text::turn; where that gives no token, a conversation begins with the model's first one, if it has one.
  std::vector<std::int64_t> turn(const std::string& words, const std::optional<std::string>& system,
                                 bool begins) const;
  // Throws Failure where text cannot be had, with the reason.
  const Text& require_text() const;

  const Bundle bundle;
  const std::unique_ptr<Engine> engine;
  const std::int64_t chunk;
  const bool verified;  // what runs was hashed
  std::unique_ptr<const Text> text;
  std::string text_missing;  // why there is no text, where there is none
  const std::string device;  // its name, "" on the CPU

 private:
  void open_text(const std::string& library);
  std::string text_fix_;
};

}  // namespace kvexport::detail
