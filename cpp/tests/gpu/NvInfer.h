// A test double of TensorRT's header, with the declarations that tensorrt_*.cpp use, as in the public
// interface of TensorRT 10.3 to 11.x; implemented in fake_nvinfer.cpp. FAKE_TENSORRT_OLD removes what 10.3
// lacks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace nvinfer1 {

enum class DataType : std::int32_t {
  kFLOAT = 0,
  kHALF = 1,
  kINT8 = 2,
  kINT32 = 3,
  kBOOL = 4,
  kBF16 = 7,
  kINT64 = 8
};
enum class TensorLocation : std::int32_t { kDEVICE = 0, kHOST = 1 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t {
  kSTATIC = 0,
  kON_PROFILE_CHANGE = 1,
  kUSER_MANAGED = 2
};
#ifndef FAKE_TENSORRT_OLD
enum class EngineStat : std::int32_t { kTOTAL_WEIGHTS_SIZE = 0, kSTRIPPED_WEIGHTS_SIZE = 1 };
#endif

struct Dims {
  std::int32_t nbDims;
  std::int64_t d[8];
};

class ILogger {
 public:
  enum class Severity : std::int32_t {
    kINTERNAL_ERROR = 0,
    kERROR = 1,
    kWARNING = 2,
    kINFO = 3,
    kVERBOSE = 4
  };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class ICudaEngine;

class IExecutionContext {
 public:
  explicit IExecutionContext(const ICudaEngine& engine);
  virtual ~IExecutionContext() noexcept;
  bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept;
  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept;
  bool setInputShape(const char* name, const Dims& dims) noexcept;
  bool setTensorAddress(const char* name, void* data) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

class ICudaEngine {
 public:
  struct Plan;
  explicit ICudaEngine(std::shared_ptr<Plan> plan);
  virtual ~ICudaEngine() noexcept;
  std::int32_t getNbIOTensors() const noexcept;
  const char* getIOTensorName(std::int32_t index) const noexcept;
  TensorIOMode getTensorIOMode(const char* name) const noexcept;
  TensorLocation getTensorLocation(const char* name) const noexcept;
  DataType getTensorDataType(const char* name) const noexcept;
  Dims getTensorShape(const char* name) const noexcept;
  std::int64_t getDeviceMemorySizeV2() const noexcept;
  IExecutionContext* createExecutionContext(
      ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC) noexcept;
#ifndef FAKE_TENSORRT_OLD
  std::int64_t getEngineStat(EngineStat stat) const noexcept;
  const char* getAliasedInputTensor(const char* name) const noexcept;
#endif

 private:
  friend class IExecutionContext;
  std::shared_ptr<Plan> plan_;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& logger) : logger_(logger) {}
  virtual ~IRuntime() noexcept = default;
  ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept;

 private:
  ILogger& logger_;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1

extern "C" std::int32_t getInferLibVersion() noexcept;
