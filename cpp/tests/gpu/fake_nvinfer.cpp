// A simulated TensorRT. Its engine runs the lowered graph of a bundle with ONNX Runtime on the CPU, on the
// memory at the bound addresses, when the simulated driver runs the queued work. It is stricter than the real
// one: the stream fails on memory outside the device, sizes outside the profile, writes outside the cache, a
// context without scratch memory, and capture of the first run. A plan is a JSON file
// (tests/cpp/engine_bundles.py) with the graph, its capacity, and what a builder would fix.
#include <NvInfer.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "engines/ort_api.hpp"
#include "fake_cuda.hpp"

namespace ort = kvexport::detail::ort;
using nlohmann::json;

namespace {

const std::string WINDOW = "window_";  // start of the symbolic size of a ring

struct Tensor {
  bool input = false;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<std::int64_t> sizes;
  std::vector<std::string> names;  // names of symbolic sizes, "" for constant ones
};

std::size_t width_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return 8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return 2;
    default: return 4;
  }
}

}  // namespace

namespace nvinfer1 {

struct ICudaEngine::Plan {
  json content;
  const OrtApi& api = ort::api();
  ort::Owned<OrtEnv> env = ort::make(api, api.ReleaseEnv, api.CreateEnv, ORT_LOGGING_LEVEL_ERROR, "fake");
  ort::Owned<OrtMemoryInfo> memory =
      ort::make(api, api.ReleaseMemoryInfo, api.CreateCpuMemoryInfo, OrtDeviceAllocator, OrtMemTypeDefault);
  ort::Owned<OrtSession> session{nullptr, nullptr};
  std::map<std::string, Tensor> tensors;
  std::vector<std::string> order;
  void* weights = nullptr;

  explicit Plan(json given) : content(std::move(given)) {
    weights = fake_cuda::take_memory(content.at("weights").get<std::size_t>());
    if (weights == nullptr) throw std::runtime_error("no memory for the weights");
    const std::string graph = content.at("graph"), path = content.at("runs");
    std::ifstream file(path, std::ios::binary);
    const std::string model{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    const auto options = ort::make(api, api.ReleaseSessionOptions, api.CreateSessionOptions);
    ort::require(api, api.SetIntraOpNumThreads(options.get(), 1));
    ort::require(
        api, api.AddSessionConfigEntry(options.get(), "session.model_external_initializers_file_folder_path",
                                       graph.substr(0, graph.rfind('/')).c_str()));
    session = ort::make(api, api.ReleaseSession, api.CreateSessionFromArray, env.get(), model.data(),
                        model.size(), options.get());
    read(true), read(false);
  }
  ~Plan() { fake_cuda::give_memory(weights); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void read(bool inputs) {
    OrtAllocator* allocator = nullptr;
    ort::require(api, api.GetAllocatorWithDefaultOptions(&allocator));
    std::size_t count = 0;
    ort::require(api, (inputs ? api.SessionGetInputCount : api.SessionGetOutputCount)(session.get(), &count));
    for (std::size_t index = 0; index < count; ++index) {
      char* name = nullptr;
      ort::require(api, (inputs ? api.SessionGetInputName : api.SessionGetOutputName)(session.get(), index,
                                                                                      allocator, &name));
      order.emplace_back(name);
      ort::require(api, api.AllocatorFree(allocator, name));
      const auto type = ort::make(api, api.ReleaseTypeInfo,
                                  inputs ? api.SessionGetInputTypeInfo : api.SessionGetOutputTypeInfo,
                                  session.get(), index);
      const OrtTensorTypeAndShapeInfo* info = nullptr;
      ort::require(api, api.CastTypeInfoToTensorInfo(type.get(), &info));
      Tensor& tensor = tensors[order.back()];
      tensor.input = inputs;
      std::size_t rank = 0;
      ort::require(api, api.GetTensorElementType(info, &tensor.type));
      ort::require(api, api.GetDimensionsCount(info, &rank));
      tensor.sizes.resize(rank);
      std::vector<const char*> names(rank);
      ort::require(api, api.GetDimensions(info, tensor.sizes.data(), rank));
      ort::require(api, api.GetSymbolicDimensions(info, names.data(), rank));
      tensor.names.assign(names.begin(), names.end());
    }
  }

  // -1: not known yet
  std::vector<std::int64_t> shape(const std::string& name, std::map<std::string, std::int64_t> sizes) const {
    sizes["capacity"] = content.at("capacity");
    if (!content.at("budget").is_null()) sizes["budget"] = content.at("budget");
    const Tensor& tensor = tensors.at(name);
    std::vector<std::int64_t> shape = tensor.sizes;
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      const std::string& symbol = tensor.names[axis];
      if (symbol.empty()) continue;
      if (symbol.rfind("batch", 0) == 0) {  // one sequence
        shape[axis] = symbol.size() > 6 ? std::stol(symbol.substr(6)) : 1;
      } else if (symbol.rfind(WINDOW, 0) == 0) {  // the window and one call
        const std::int64_t chunk = content.at("chunk");
        shape[axis] = std::min(sizes["capacity"], std::stol(symbol.substr(WINDOW.size())) + chunk);
      } else {
        shape[axis] = sizes.count(symbol) == 0 ? -1 : sizes[symbol];
      }
    }
    return shape;
  }

  // Whether a call writes past the end of a ring.
  bool wraps(std::int64_t position, std::int64_t tokens) const {
    return std::any_of(tensors.begin(), tensors.end(), [&](const auto& each) {
      const Tensor& tensor = each.second;
      if (!tensor.input || tensor.names.size() != 4 || tensor.names[2].rfind(WINDOW, 0) != 0) return false;
      const std::int64_t slots = shape(each.first, {})[2];
      return position % slots + tokens > slots;
    });
  }

  bool leaves(const std::string& size) const {  // whether a tensor has this symbolic size
    return std::any_of(tensors.begin(), tensors.end(), [&](const auto& each) {
      return std::count(each.second.names.begin(), each.second.names.end(), size) != 0;
    });
  }

  void run(const std::map<std::string, void*>& addresses, std::int64_t tokens, std::int64_t logits) const;
};

struct IExecutionContext::State {
  std::shared_ptr<ICudaEngine::Plan> plan;
  int profile = -1;
  std::map<std::string, void*> addresses;
  std::map<std::string, std::int64_t> counts;
  void* scratch = nullptr;
  std::int64_t scratch_bytes = 0;
  bool ran = false;
};

void ICudaEngine::Plan::run(const std::map<std::string, void*>& addresses, std::int64_t tokens,
                            std::int64_t logits) const {
  const std::map<std::string, std::int64_t> sizes{{"sequence", tokens}, {"logits", logits}};
  std::vector<const char*> inputs, outputs;
  std::vector<std::vector<char>> copies;  // copies of the inputs, since outputs overwrite them
  std::vector<ort::Owned<OrtValue>> owned;
  std::map<std::string, std::size_t> bytes;
  for (const std::string& name : order) {
    const std::vector<std::int64_t> dims = shape(name, sizes);
    std::size_t count = width_of(tensors.at(name).type);
    for (std::int64_t size : dims) count *= static_cast<std::size_t>(size);
    bytes[name] = count;
    if (!fake_cuda::is_memory(addresses.at(name), count))
      return fake_cuda::break_stream(name + " is bound to memory that is not the device's");
    if (!tensors.at(name).input) {
      outputs.push_back(name.c_str());
      continue;
    }
    inputs.push_back(name.c_str());
    const char* from = static_cast<const char*>(addresses.at(name));
    copies.emplace_back(from, from + count);
    owned.push_back(ort::make(api, api.ReleaseValue, api.CreateTensorWithDataAsOrtValue, memory.get(),
                              copies.back().data(), count, dims.data(), dims.size(), tensors.at(name).type));
  }
  const auto first = [&](const char* name) { return *static_cast<const std::int64_t*>(addresses.at(name)); };
  std::int64_t start = first("write_indices");
  if (!content.at("budget").is_null()) {
    const std::int64_t budget = content.at("budget");
    if (tokens == 1 ? start > budget : start + tokens > budget)
      return fake_cuda::break_stream("a write beyond the budget");
    start = leaves("capacity") ? first("position_ids") : 0;  // position of the write in the other layers
  }
  if (start < 0 || start + tokens > content.at("capacity").get<std::int64_t>())
    return fake_cuda::break_stream("a write beyond the cache, which TensorRT would drop");
  if (wraps(first("position_ids"), tokens))
    return fake_cuda::break_stream("a write past the end of a ring, which TensorRT would drop");
  std::vector<const OrtValue*> given;
  for (const auto& value : owned) given.push_back(value.get());
  std::vector<OrtValue*> made(outputs.size(), nullptr);
  ort::require(api, api.Run(session.get(), nullptr, inputs.data(), given.data(), given.size(), outputs.data(),
                            outputs.size(), made.data()));
  for (std::size_t index = 0; index < made.size(); ++index) {
    const ort::Owned<OrtValue> value(made[index], api.ReleaseValue);
    void* data = nullptr;
    ort::require(api, api.GetTensorMutableData(value.get(), &data));
    std::memcpy(addresses.at(outputs[index]), data, bytes.at(outputs[index]));
  }
}

IExecutionContext::IExecutionContext(const ICudaEngine& engine) : state_(std::make_shared<State>()) {
  state_->plan = engine.plan_;
}
IExecutionContext::~IExecutionContext() noexcept = default;

bool IExecutionContext::setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept {
  state_->profile = profile;
  return stream != nullptr && fake_cuda::has_context() && (profile == 0 || profile == 1);
}

void IExecutionContext::setDeviceMemoryV2(void* memory, std::int64_t size) noexcept {
  state_->scratch = memory, state_->scratch_bytes = size;
}

bool IExecutionContext::setInputShape(const char* name, const Dims& dims) noexcept {
  if (state_->profile < 0 || dims.nbDims != 2 || dims.d[0] != 1) return false;
  const std::int64_t most = state_->profile == 0 ? 2 : state_->plan->content.at("chunk").get<std::int64_t>();
  if (dims.d[1] < 1 || dims.d[1] > most) return false;
  state_->counts[name] = dims.d[1];
  return true;
}

bool IExecutionContext::setTensorAddress(const char* name, void* data) noexcept {
  if (reinterpret_cast<std::uintptr_t>(data) % 256 != 0 || state_->plan->tensors.count(name) == 0)
    return false;
  state_->addresses[name] = data;
  return true;
}

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
  State& state = *state_;
  const auto refuse = [](const std::string& why) {
    fake_cuda::break_stream(why);
    return false;
  };
  if (!fake_cuda::has_context()) return refuse("no context is current");
  if (state.profile < 0) return refuse("no profile was chosen");
  const std::int64_t required_scratch = state.plan->content.value("scratch", std::int64_t{5000});
  if (state.scratch == nullptr || state.scratch_bytes < required_scratch)
    return refuse("there is no scratch memory");
  if (state.addresses.size() != state.plan->tensors.size()) return refuse("a tensor has no address");
  const auto& counts = state.counts;
  if (counts.count("input_ids") == 0 || counts.count("position_ids") == 0 ||
      counts.count("logits_index") == 0)
    return refuse("an input has no shape");
  if (counts.at("input_ids") != counts.at("position_ids")) return refuse("inputs contradict each other");
  if (fake_cuda::capturing(stream) && !state.ran)
    return refuse("the first run of a context cannot be captured");
  state.ran = true;
  // the sizes that a captured graph keeps
  const std::int64_t tokens = counts.at("input_ids"), logits = counts.at("logits_index");
  fake_cuda::enqueue(stream, "engine",
                     [plan = state.plan, addresses = state.addresses, scratch = state.scratch,
                      required_scratch, tokens, logits] {
                       if (!fake_cuda::is_memory(scratch, static_cast<std::size_t>(required_scratch)))
                         return fake_cuda::break_stream("scratch memory is gone");
                       std::memset(scratch, 0xff, static_cast<std::size_t>(required_scratch));
                       try {
                         plan->run(addresses, tokens, logits);
                       } catch (const std::exception& error) {
                         fake_cuda::break_stream(error.what());
                       }
                     });
  return true;
}

ICudaEngine::ICudaEngine(std::shared_ptr<Plan> plan) : plan_(std::move(plan)) {}
ICudaEngine::~ICudaEngine() noexcept = default;
std::int32_t ICudaEngine::getNbIOTensors() const noexcept {
  return static_cast<std::int32_t>(plan_->order.size());
}
const char* ICudaEngine::getIOTensorName(std::int32_t index) const noexcept {
  return plan_->order.at(static_cast<std::size_t>(index)).c_str();
}
TensorIOMode ICudaEngine::getTensorIOMode(const char* name) const noexcept {
  return plan_->tensors.at(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}
TensorLocation ICudaEngine::getTensorLocation(const char* name) const noexcept {
  return plan_->content.value("on_host", "") == name ? TensorLocation::kHOST : TensorLocation::kDEVICE;
}
DataType ICudaEngine::getTensorDataType(const char* name) const noexcept {
  switch (plan_->tensors.at(name).type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return DataType::kINT64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return DataType::kHALF;
    default: return DataType::kFLOAT;
  }
}
Dims ICudaEngine::getTensorShape(const char* name) const noexcept {
  Dims dims{};
  for (std::int64_t size : plan_->shape(name, {})) dims.d[dims.nbDims++] = size;
  return dims;
}
std::int64_t ICudaEngine::getDeviceMemorySizeV2() const noexcept {
  return plan_->content.value("scratch", std::int64_t{5000});
}
IExecutionContext* ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
  if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED || !fake_cuda::has_context())
    return nullptr;
  return new IExecutionContext(*this);
}
#ifndef FAKE_TENSORRT_OLD
std::int64_t ICudaEngine::getEngineStat(EngineStat stat) const noexcept {
  return stat == EngineStat::kTOTAL_WEIGHTS_SIZE ? plan_->content.at("weights").get<std::int64_t>() : -1;
}
const char* ICudaEngine::getAliasedInputTensor(const char* name) const noexcept {
  const std::string output = name;
  if (output.rfind("present.", 0) != 0 || plan_->content.value("apart", "") == output) return nullptr;
  const auto found = plan_->tensors.find("past_key_values" + output.substr(output.find('.')));
  return found == plan_->tensors.end() ? nullptr : found->first.c_str();
}
#endif

ICudaEngine* IRuntime::deserializeCudaEngine(const void* blob, std::size_t size) noexcept {
  try {
    const auto* text = static_cast<const char*>(blob);
    if (!fake_cuda::has_context()) throw std::runtime_error("no context is current");
    return new ICudaEngine(std::make_shared<ICudaEngine::Plan>(json::parse(text, text + size)));
  } catch (const std::exception& error) {
    logger_.log(ILogger::Severity::kERROR,
                (std::string("magic tag does not match: ") + error.what()).c_str());
    logger_.log(ILogger::Severity::kWARNING, "not an error");
    return nullptr;
  }
}

IRuntime* createInferRuntime(ILogger& logger) noexcept { return new IRuntime(logger); }

}  // namespace nvinfer1

#ifdef FAKE_TENSORRT_OLD
extern "C" std::int32_t getInferLibVersion() noexcept { return 100300; }
#else
extern "C" std::int32_t getInferLibVersion() noexcept { return 101602; }
#endif
