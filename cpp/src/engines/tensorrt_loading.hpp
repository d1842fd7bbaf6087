// Loads a TensorRT plan and checks the engine against its record and the bundle (TensorRT 10.3 to 11.x and
// TensorRT-RTX). Not yet run on a GPU; see tensorrt_engine.cpp.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <mutex>
#include <string>

#include "bundle/error.hpp"
#include "bundle/manifest.hpp"
#include "engines/engine_choice.hpp"

namespace kvexport::detail {

// Stores the last error; prints nothing.
class TensorRtLog final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  std::string last() const;

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

// Members are destroyed in reverse order: the engine needs the runtime, the runtime needs the log.
struct LoadedEngine {
  std::shared_ptr<TensorRtLog> log;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;

  Failure failure(const std::string& what) const;  // includes TensorRT's last error
};

// The library that is loaded, which may be later than the headers.
EngineLibrary tensorrt_library();

// Throws Failure if TensorRT cannot load the plan.
LoadedEngine load_engine(const BuildRecord& record);

// Throws Failure if the engine's inputs and outputs differ from those that the record and the bundle require.
void require_contract(const LoadedEngine& loaded, const BuildRecord& record, const Manifest& manifest);

// Names of the graph's token inputs, in the order of Call.
constexpr const char* TOKEN_INPUTS[] = {"input_ids", "position_ids", "write_indices", "logits_index"};

// Whether the graph writes the cache in place (std24) or outputs new keys and values (decomposed17).
inline bool writes_in_place(const BuildRecord& record) { return record.lowering != "decomposed17"; }

// Output names of decomposed17: "update.3.key" for the input "past_key_values.3.key".
inline std::string update_of(const std::string& past) { return "update" + past.substr(past.find('.')); }
inline std::string slots_of(int layer) { return "slots." + std::to_string(layer); }

}  // namespace kvexport::detail
