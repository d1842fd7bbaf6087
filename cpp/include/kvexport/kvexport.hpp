// The C++17 API of kvexport: runs a bundle inside an application, without Python and PyTorch. Link with the
// CMake target kvexport::kvexport.
//
//   kvexport::Session session("half");                 // verifies and loads the bundle; throws
//   kvexport::Error kvexport::Cache cache = session.new_cache(512);    // allocates all memory of the
//   conversation: cache.bytes() cache.generate(cache.turn("Once upon a time"), {}, [](std::int64_t,
//   std::string_view text) {
//     std::cout << text << std::flush;
//     return true;                                     // false ends the generation
//   });
//
// A cache is one conversation; the caches of a session share its weights. A cache may be used by one thread
// at a time, different caches by different threads at the same time. A cache allocates no memory after it was
// made, except for temporary values of the engine. All functions throw Error; a call with invalid arguments
// leaves its cache unchanged. kvexport.h documents the functions in more detail.
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

using Ids = std::vector<std::int64_t>;  // token ids

// The exception of this library.
class Error : public std::exception {
 public:
  explicit Error(kvexport_error* error) : error_(error, kvexport_error_free) {}

  int code() const { return kvexport_error_code(error_.get()); }    // KVEXPORT_USAGE, ...
  const char* failed() const { return part(KVEXPORT_FAILED); }      // what failed
  const char* got() const { return part(KVEXPORT_GOT); }            // the value that was found, or ""
  const char* expected() const { return part(KVEXPORT_EXPECTED); }  // the values that are allowed, or ""
  const char* fix() const { return part(KVEXPORT_FIX); }            // how to fix it, or ""
  const char* what() const noexcept override { return part(KVEXPORT_MESSAGE); }  // all parts, one per line

 private:
  const char* part(int which) const noexcept { return kvexport_error_part(error_.get(), which); }
  std::shared_ptr<kvexport_error> error_;
};

struct OpenOptions {
  // "cpu", "cuda" or "tensorrt"; "auto": a TensorRT engine of the bundle that fits, else CUDA, else the CPU.
  std::string provider = "auto";
  int threads = 0;           // CPU threads per operator; 0: one per core
  bool verify = true;        // hash the weights too; all other files are always hashed
  std::int64_t chunk = 128;  // largest number of prompt tokens that are run at once
  // Name or path of the library that converts text; "": token ids only.
  std::string text_library = "libonnxruntime-genai.so";
};

struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  std::optional<double> temperature;  // 0: greedy; none: 1 if top_k or top_p is set, else 0
  std::int64_t top_k = 0;             // sample from the K most likely tokens; 0: from all
  double top_p = 1;                   // sample from the most likely tokens that reach this probability
  std::optional<std::uint64_t> seed;  // random seed (Python draws other tokens); none: different in each call
  std::optional<Ids> stop_tokens;     // none: the model's EOS tokens
  std::vector<std::string> stop_texts;  // the output ends before them
};

// Why a generation ended: a stop token or stop text, max_new_tokens, a full cache, or the callback.
enum class Finish { stop, length, capacity, callback };

// Logits after one token, in the memory of the cache; valid until the cache's next call.
struct Logits {
  const float* values;  // [vocab_size]
  std::int64_t vocab_size;
  std::int64_t likeliest() const { return std::max_element(values, values + vocab_size) - values; }
};

// One conversation: the keys and values of its tokens. Move-only. Shares the session's weights.
class Cache {
 public:
  // Runs tokens after those in the cache, and returns the logits after the last one. Without tokens, the last
  // token is run again. Throws Error (KVEXPORT_USAGE) if an id is not in the vocabulary or the tokens do not
  // fit.
  Logits prefill(const Ids& ids);

  // Runs one token.
  Logits step(std::int64_t token);

  // Called with each new token and the whole characters that it completes; if text was held back for a stop
  // text, once more at the end with token -1. False ends the generation. It may throw, but not use this
  // cache.
  using OnToken = std::function<bool(std::int64_t token, std::string_view text)>;

  // Runs a prompt and generates tokens. The next call runs the last token first, so a conversation is
  // continued by passing the next turn only; without ids the generation continues. Rethrows exceptions of the
  // callback.
  Finish generate(const Ids& ids, const GenerateOptions& options = {}, const OnToken& on_token = nullptr);

  // Encodes a user's message as the next turn: formatted by the model's chat template, or the text itself,
  // with BOS at the start, if it has none. `system`: a system prompt, in the first turn only. The cache is
  // not changed.
  Ids turn(const std::string& text, const std::string& system = "") const;

  // Writes the cache to a file for Session::load. The file appears only when it is complete.
  void save(const std::string& file);

  // Removes all tokens; the memory is kept.
  void clear();

  std::size_t bytes() const;      // size of all buffers; it never changes
  std::int64_t length() const;    // tokens that were run, without a generated token that is still pending
  std::int64_t capacity() const;  // largest number of tokens

 private:
  friend class Session;
  using Owned = std::unique_ptr<kvexport_cache, void (*)(kvexport_cache*)>;
  Cache(Owned cache, std::int64_t vocab_size) : cache_(std::move(cache)), vocab_size_(vocab_size) {}
  Owned cache_;
  std::int64_t vocab_size_;
};

// An open bundle: verified files and loaded weights. Move-only. May be used by several threads at the same
// time.
class Session {
 public:
  // Throws Error: KVEXPORT_USAGE if there is no bundle, it is damaged, or an option is out of range;
  // KVEXPORT_CANNOT_RUN_HERE if the provider is not available or there is not enough memory.
  explicit Session(const std::string& bundle, const OpenOptions& options = {});

  // An empty cache for `capacity` tokens, prompts and answers together; 0: as many as the bundle or its
  // engine allows.
  Cache new_cache(std::int64_t capacity = 0);

  // A cache from a file that Cache::save, or Cache.save in Python, wrote for the same bundle: a long prompt
  // is prefilled only once.
  Cache load(const std::string& file, std::int64_t capacity = 0);

  // Converts between text and token ids. `special`: add special tokens such as BOS. decode omits special
  // tokens. Throws Error (KVEXPORT_CANNOT_RUN_HERE) if info().has_text is 0; info().text_missing has the
  // reason.
  Ids encode(const std::string& text, bool special = true) const;
  std::string decode(const Ids& ids) const;

  // Memory in bytes of one cache of `capacity` tokens, and of the GPU. Layers with a sliding window hold the
  // window and the tokens of one call.
  kvexport_memory memory(std::int64_t capacity = 0) const;

  // Properties of the bundle and of the engine that runs it; valid as long as the session.
  const kvexport_info& info() const;

  // Compares this machine's results with the reference outputs in the bundle, and returns a report (JSON).
  // Throws Error with KVEXPORT_GATE_FAILED if they differ, naming the cause: weights, engine, precision or
  // cache; with KVEXPORT_USAGE if files are damaged. Weights that `verify` = false skipped are hashed here.
  std::string self_test() const;

 private:
  std::unique_ptr<kvexport_session, void (*)(kvexport_session*)> session_;
};

}  // namespace kvexport

#include "kvexport_inline.hpp"
