// What a session runs on: tokens in, logits out, keys and values in the bound cache. One Engine per session,
// one Binding per cache.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "bundle/manifest.hpp"
#include "runtime/buffers.hpp"
#include "runtime/storage.hpp"

namespace kvexport::detail {

// Arguments of one call for one sequence. The arrays belong to the caller.
struct Call {
  const std::int64_t* input_ids;     // [tokens]
  const std::int64_t* position_ids;  // [tokens], consecutive
  std::int64_t tokens;               // 1 to Engine::max_tokens_per_call
  std::int64_t write_index;          // first slot to write; the number of slots if one must be evicted
  const std::int64_t* logits_index;  // [logits]: tokens that get logits
  std::int64_t logits;               // at least 1
  bool shrink = false;               // release memory of temporary values after the call, if the engine can
};

// A cache bound to the inputs and outputs of the graph, with the other arrays of a call, and a captured graph
// on a GPU. Owned by the cache; destroyed before the engine.
class Binding {
 public:
  virtual ~Binding() = default;
};

class Engine {
 public:
  virtual ~Engine() = default;

  virtual const std::string& provider() const = 0;  // "cpu", "cuda" or "tensorrt"
  virtual const std::string& version() const = 0;   // e.g. "onnxruntime 1.31.1", "tensorrt 10.3.0"
  virtual Dtype computes_in() const = 0;
  virtual Storage& storage() = 0;                        // memory that buffers must be in
  virtual std::int64_t max_tokens_per_call() const = 0;  // tokens
  virtual std::int64_t capacity() const = 0;             // tokens of a cache
  virtual bool has_fixed_capacity() const = 0;           // all caches have capacity()
  virtual std::int64_t growth_step() const = 0;          // tokens by which caches grow; 0: they do not
  virtual DeviceMemory device_memory() const { return {}; }

  // May allocate. `buffers` must outlive the binding.
  virtual std::unique_ptr<Binding> bind(Buffers& buffers) = 0;

  // Runs one call in place on the bound buffers; rebinds them first if `buffers.generation` changed. Returns
  // the logits [call.logits, vocab_size], which are valid until the binding's next call. Different bindings
  // may be used by different threads at the same time. Throws Failure.
  virtual const float* run(Binding& binding, const Call& call) = 0;
};

// `bundle` is open and verified. Both functions throw Failure (cannot_run_here) if the engine is not
// available.
class Bundle;
// `provider`: "cpu" or "cuda".
std::unique_ptr<Engine> open_onnxruntime(const Bundle& bundle, const std::string& provider, int threads);
// `verify`: hash the engine's plan. Without TensorRT at build time it always throws.
std::unique_ptr<Engine> open_tensorrt(const Bundle& bundle, bool verify = true);
bool has_engine(const Bundle& bundle);  // whether the bundle has any engine, for whatever device

}  // namespace kvexport::detail
