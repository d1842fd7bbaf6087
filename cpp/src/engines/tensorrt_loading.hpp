// A plan becomes a TensorRT engine, and is held against its record and the bundle before anything is bound.
// Knows TensorRT's runtime (10.3 to 11.x and TensorRT-RTX); must not know how an engine is called.
//
// It has not been run on a GPU: see tensorrt_engine.cpp.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <mutex>
#include <string>

#include "bundle/error.hpp"
#include "bundle/manifest.hpp"
#include "engines/engine_choice.hpp"

namespace kvexport::detail {

// Keeps the last error; says nothing itself.
class TensorRtLog final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  std::string last() const;

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

// Destroyed from the last one on: an engine needs its runtime, and that the log.
struct LoadedEngine {
  std::shared_ptr<TensorRtLog> log;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;

  Failure failure(const std::string& what) const;  // with TensorRT's own words
};

// The library that runs here, which may be a later one than that of the headers.
EngineLibrary tensorrt_library();

// Throws Failure: TensorRT cannot load the plan.
LoadedEngine load_engine(const BuildRecord& record);

// Throws Failure: the engine takes or gives other tensors than its record and the bundle say.
void require_contract(const LoadedEngine& loaded, const BuildRecord& record, const Manifest& manifest);

// As the graph's inputs are called, in the order of Call.
constexpr const char* TOKEN_INPUTS[] = {"input_ids", "position_ids", "write_indices", "logits_index"};

// Whether the graph writes the cache in place (std24), or gives what is new (decomposed17).
inline bool writes_in_place(const BuildRecord& record) { return record.lowering != "decomposed17"; }

// Names of outputs of a graph that does not, by the names of the caches: "update.3.key" of
// "past_key_values.3.key".
inline std::string update_of(const std::string& past) { return "update" + past.substr(past.find('.')); }
inline std::string slots_of(int layer) { return "slots." + std::to_string(layer); }

}  // namespace kvexport::detail
