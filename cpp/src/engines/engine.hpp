// What a session runs on, whichever engine it is: tokens in, logits out, a cache that holds the sequence.
// One Engine a session, one Binding a cache.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "bundle/manifest.hpp"
#include "runtime/buffers.hpp"
#include "runtime/storage.hpp"

namespace kvexport::detail {

// One call of the graph for one sequence; the arrays are the caller's and live until it returns.
struct Call {
  const std::int64_t* input_ids;     // [tokens]
  const std::int64_t* position_ids;  // [tokens], consecutive
  std::int64_t tokens;               // 1 .. Engine::longest
  std::int64_t write_index;          // slots in use; where nothing evicts, the first position
  const std::int64_t* logits_index;  // [logits]: which of the tokens get logits
  std::int64_t logits;               // 1 or more
  bool shrink =
      false;  // afterwards, give back to the system what temporary values took, where that can be had
};

// A cache bound to the graph's inputs and outputs, with whatever a call needs beside it (arrays for tokens
// and logits, on a GPU a captured graph). Kept by its cache, dropped before the engine is.
class Binding {
 public:
  virtual ~Binding() = default;
};

class Engine {
 public:
  virtual ~Engine() = default;

  virtual const std::string& provider() const = 0;  // "cpu", "cuda" or "tensorrt"
  virtual const std::string& version() const = 0;   // "onnxruntime 1.31.1", "tensorrt 10.3.0"
  virtual Dtype computes_in() const = 0;
  virtual Storage& storage() = 0;                        // where buffers must be
  virtual std::int64_t max_tokens_per_call() const = 0;  // the most tokens of one call
  virtual std::int64_t capacity() const = 0;             // the most tokens of a cache
  virtual bool has_fixed_capacity()
      const = 0;  // buffers have room for exactly `capacity()`, however little is asked for
  virtual std::int64_t growth_step()
      const = 0;  // tokens by which buffers grow; 0: they have their full size from the start
  virtual DeviceMemory device_memory() const { return {}; }

  // May allocate; `buffers` outlives the binding.
  virtual std::unique_ptr<Binding> bind(Buffers& buffers) = 0;

  // Runs one call in place on the bound buffers (rebinding first where `buffers.generation` changed since).
  // The logits [call.logits, vocab_size] are the binding's and stay until its next call. Different bindings
  // may be run by different threads at once: an engine that cannot takes turns inside. Throws Failure.
  virtual const float* run(Binding& binding, const Call& call) = 0;
};

// `bundle` is opened and its files are checked; each throws Failure (cannot_run_here) with the remedy where
// it cannot be had.
class Bundle;
std::unique_ptr<Engine> open_onnxruntime(const Bundle& bundle, const std::string& provider,
                                         int threads);  // "cpu", "cuda"
// `verify`: hash the engine's plan. Where built without TensorRT's headers: says so.
std::unique_ptr<Engine> open_tensorrt(const Bundle& bundle, bool verify = true);
bool has_engine(const Bundle& bundle);  // whether engines/*/build.json are there at all

}  // namespace kvexport::detail
