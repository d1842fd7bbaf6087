// The graph on ONNX Runtime, on the CPU or on CUDA, with caches bound in place. The CUDA path has not yet
// been run on a GPU.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bundle/bundle.hpp"
#include "bundle/error.hpp"
#include "engines/cuda_driver.hpp"
#include "engines/engine.hpp"
#include "engines/ort_api.hpp"
#include "runtime/host_storage.hpp"

namespace kvexport::detail {

namespace {

using ort::make;
using ort::Owned;
using ort::require;

// Number of tokens by which caches grow. Attention reads the whole buffer, so the layout must follow the
// length closely; moving the heads at each growth costs 1/STEP of what attention reads in between.
constexpr std::int64_t STEP = 256;

// ONNX Runtime packages since 1.29 send usage data and store some in the user's home directory, unless the
// environment forbids it before the library starts (its docs/Privacy.md). ORT_DISABLE_TELEMETRY=0 allows it.
// Set when this library is loaded, since setenv is not safe once there are several threads.
__attribute__((constructor)) void forbid_telemetry() { ::setenv("ORT_DISABLE_TELEMETRY", "1", 0); }

ONNXTensorElementDataType element_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Dtype::bfloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

struct Tensor {  // -1 in `shape`: any size
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<std::int64_t> shape;

  std::string text() const {
    std::string text = name + ", type " + std::to_string(type) + ", shape (";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      text += (axis == 0 ? "" : ", ") + (shape[axis] < 0 ? std::string("any") : std::to_string(shape[axis]));
    }
    return text + ")";
  }
};

std::vector<Tensor> expected_tensors(const Manifest& manifest, bool inputs) {
  constexpr auto ids = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  std::vector<Tensor> all;
  if (inputs) {
    all = {{"input_ids", ids, {-1, -1}},
           {"position_ids", ids, {-1, -1}},
           {"write_indices", ids, {-1}},
           {"logits_index", ids, {-1, -1}}};
  } else {
    all = {{"logits", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {-1, -1, manifest.vocab_size}}};
  }
  for (const Buffer& buffer : buffers_of(manifest, {manifest.capacity, 1})) {
    const std::vector<std::int64_t> shape{-1, buffer.evicts ? 1 : buffer.heads, -1, buffer.width};
    all.push_back({inputs ? buffer.past : buffer.present, element_type(buffer.dtype), shape});
  }
  return all;
}

std::vector<Tensor> tensors_of(const OrtApi& api, const OrtSession* session, bool inputs) {
  OrtAllocator* allocator = nullptr;
  require(api, api.GetAllocatorWithDefaultOptions(&allocator));
  std::size_t count = 0;
  require(api,
          inputs ? api.SessionGetInputCount(session, &count) : api.SessionGetOutputCount(session, &count));
  std::vector<Tensor> all;
  for (std::size_t index = 0; index < count; ++index) {
    char* name = nullptr;
    require(api,
            (inputs ? api.SessionGetInputName : api.SessionGetOutputName)(session, index, allocator, &name));
    Tensor tensor{name, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
    require(api, api.AllocatorFree(allocator, name));
    const auto get = inputs ? api.SessionGetInputTypeInfo : api.SessionGetOutputTypeInfo;
    const auto type = make(api, api.ReleaseTypeInfo, get, session, index);
    const OrtTensorTypeAndShapeInfo* info = nullptr;
    require(api, api.CastTypeInfoToTensorInfo(type.get(), &info));
    if (info != nullptr) {
      std::size_t rank = 0;
      require(api, api.GetTensorElementType(info, &tensor.type));
      require(api, api.GetDimensionsCount(info, &rank));
      tensor.shape.resize(rank);
      require(api, api.GetDimensions(info, tensor.shape.data(), rank));
    }
    all.push_back(std::move(tensor));
  }
  return all;
}

void require_contract(const OrtApi& api, const OrtSession* session, const Manifest& manifest) {
  for (const bool inputs : {true, false}) {
    const std::string kind = inputs ? "input" : "output";
    const std::vector<Tensor> got = tensors_of(api, session, inputs),
                              expected = expected_tensors(manifest, inputs);
    if (got.size() != expected.size()) {
      throw bundle_error("the bundle's graph must have the " + kind + "s of its manifest",
                         std::to_string(got.size()) + " " + kind + "s",
                         std::to_string(expected.size()) + " " + kind + "s");
    }
    for (std::size_t index = 0; index < got.size(); ++index) {
      if (got[index].text() != expected[index].text()) {
        throw bundle_error("every " + kind + " of the bundle's graph must match its manifest",
                           got[index].text(), expected[index].text());
      }
    }
  }
}

// Errors are returned as statuses; the log must not reach the application's terminal.
void ORT_API_CALL ignore_log(void*, OrtLoggingLevel, const char*, const char*, const char*, const char*) {}

struct OrtBinding final : Binding {
  OrtBinding(const OrtApi& api, OrtSession* session, Buffers& buffers)
      : api(api), buffers(buffers), io(make(api, api.ReleaseIoBinding, api.CreateIoBinding, session)) {}

  const OrtApi& api;
  Buffers& buffers;
  std::int64_t generation = -1, tokens = 0, rows = 0;  // of the current bindings; 0: none
  std::vector<std::int64_t> input_ids, position_ids, logits_index;
  std::int64_t write_index = 0;
  std::vector<float> logits;
  Owned<OrtIoBinding> io;
};

class OrtEngine final : public Engine {
 public:
  OrtEngine(const Bundle& bundle, const std::string& provider, int threads)
      : api_(ort::api()),
        manifest_(bundle.manifest),
        provider_(provider),
        version_(std::string("onnxruntime ") + OrtGetApiBase()->GetVersionString()) {
    env_ = make(api_, api_.ReleaseEnv, api_.CreateEnvWithCustomLogger, ignore_log, nullptr,
                ORT_LOGGING_LEVEL_FATAL, "kvexport");
    auto options = make(api_, api_.ReleaseSessionOptions, api_.CreateSessionOptions);
    require(api_, api_.SetIntraOpNumThreads(options.get(), threads));
    require(api_, api_.SetInterOpNumThreads(options.get(), 1));
    // As Python: linear maps with integer weights round activations to int8 on the CPU.
    require(api_, api_.AddSessionConfigEntry(options.get(), "session.qdq_matmulnbits_accuracy_level", "4"));
    require(api_, api_.SetUserLoggingFunction(options.get(), ignore_log, nullptr));
    host_memory_ =
        make(api_, api_.ReleaseMemoryInfo, api_.CreateCpuMemoryInfo, OrtDeviceAllocator, OrtMemTypeDefault);
    shrinking_ = make(api_, api_.ReleaseRunOptions, api_.CreateRunOptions);
    if (on_device()) {
      open_cuda(options.get());
    } else {
      storage_ = std::make_unique<HostStorage>();
      require(api_,
              api_.AddRunConfigEntry(shrinking_.get(), "memory.enable_memory_arena_shrinkage", "cpu:0"));
    }
    load(bundle, options.get());
  }

  const std::string& provider() const override { return provider_; }
  const std::string& version() const override { return version_; }
  Dtype computes_in() const override { return manifest_.dtype; }
  Storage& storage() override { return *storage_; }
  std::int64_t max_tokens_per_call() const override { return std::numeric_limits<std::int64_t>::max(); }
  std::int64_t capacity() const override { return manifest_.capacity; }
  bool has_fixed_capacity() const override { return false; }
  std::int64_t growth_step() const override { return on_device() ? 0 : STEP; }
  DeviceMemory device_memory() const override {
    DeviceMemory memory = storage_->device_memory();
    memory.weights = weights_bytes_;
    return memory;
  }

  std::unique_ptr<Binding> bind(Buffers& buffers) override {
    return std::make_unique<OrtBinding>(api_, session_.get(), buffers);
  }

  const float* run(Binding& opaque, const Call& call) override {
    auto& binding = static_cast<OrtBinding&>(opaque);
    shape(binding, call);
    std::copy_n(call.input_ids, call.tokens, binding.input_ids.data());
    std::copy_n(call.position_ids, call.tokens, binding.position_ids.data());
    std::copy_n(call.logits_index, call.logits, binding.logits_index.data());
    binding.write_index = call.write_index;
    if (on_device()) {
      // ONNX Runtime copies bound host memory to the device when it is bound, so it is bound again for each
      // call.
      bind_tokens(binding);
      storage_->synchronize();  // ONNX Runtime uses its own streams
      require(api_, api_.SynchronizeBoundInputs(binding.io.get()));
    }
    const OrtRunOptions* options = call.shrink && !on_device() ? shrinking_.get() : nullptr;
    require(api_, api_.RunWithBinding(session_.get(), options, binding.io.get()),
            "ONNX Runtime failed to run the graph");
    if (on_device()) require(api_, api_.SynchronizeBoundOutputs(binding.io.get()));
    return binding.logits.data();
  }

 private:
  bool on_device() const { return provider_ == "cuda"; }

  void open_cuda(OrtSessionOptions* options) {
    char** names = nullptr;
    int count = 0;
    require(api_, api_.GetAvailableProviders(&names, &count));
    std::string available;
    bool has_cuda = false;
    for (int index = 0; index < count; ++index) {
      has_cuda = has_cuda || std::strcmp(names[index], "CUDAExecutionProvider") == 0;
      available += (index == 0 ? "" : ", ") + std::string(names[index]);
    }
    require(api_, api_.ReleaseAvailableProviders(names, count));
    if (!has_cuda) {
      throw Failure(Code::cannot_run_here, "ONNX Runtime must be built with CUDA for provider \"cuda\"",
                    version_ + " with " + available, "",
                    "replace libonnxruntime.so.1 by one that was built with CUDA, or use provider \"cpu\"");
    }
    storage_ = open_cuda_storage();
    auto cuda = make(api_, api_.ReleaseCUDAProviderOptions, api_.CreateCUDAProviderOptions);
    // kSameAsRequested: the default rounds the arena up to a power of two, which takes memory that caches
    // need.
    const char* keys[] = {"device_id", "arena_extend_strategy"};
    const char* values[] = {"0", "kSameAsRequested"};
    require(api_, api_.UpdateCUDAProviderOptions(cuda.get(), keys, values, 2));
    require(api_, api_.SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()),
            "ONNX Runtime could not start on the GPU");
    device_memory_ = make(api_, api_.ReleaseMemoryInfo, api_.CreateMemoryInfo, "Cuda", OrtDeviceAllocator, 0,
                          OrtMemTypeDefault);
  }

  void load(const Bundle& bundle, const OrtSessionOptions* options) {
    const std::string lowered = "decoder." + provider_ + ".onnx";
    const std::string path = bundle.path + "/" + (manifest_.has(lowered) ? lowered : "decoder.onnx");
    const std::size_t free = storage_->device_memory().free;
    OrtSession* session = nullptr;
    OrtStatus* status = api_.CreateSession(env_.get(), path.c_str(), options, &session);
    if (status != nullptr) {
      const std::string message = ort::error_message(api_, status);
      throw Failure(Code::cannot_run_here, version_ + " cannot load the graph of the bundle " + bundle.path,
                    message.substr(0, message.find('\n')), "onnxruntime 1.28 or later, and an undamaged bundle",
                    "use a newer ONNX Runtime; check the bundle: kvexport inspect --verify " + bundle.path);
    }
    session_ = Owned<OrtSession>(session, api_.ReleaseSession);
    const std::size_t left = storage_->device_memory().free;
    weights_bytes_ = free > left ? free - left : 0;
    require_contract(api_, session, manifest_);
#ifdef __GLIBC__
    malloc_trim(0);  // returns the memory of weights that were copied in another layout, and freed
#endif
  }

  Owned<OrtValue> tensor(const OrtMemoryInfo* memory, void* data, std::size_t bytes,
                         const std::vector<std::int64_t>& shape, ONNXTensorElementDataType type) const {
    return make(api_, api_.ReleaseValue, api_.CreateTensorWithDataAsOrtValue, memory, data, bytes,
                shape.data(), shape.size(), type);
  }

  // Binds arrays whose shape changed since the last call; most decode steps bind nothing.
  void shape(OrtBinding& binding, const Call& call) {
    if (binding.generation != binding.buffers.generation) {
      const OrtMemoryInfo* memory = on_device() ? device_memory_.get() : host_memory_.get();
      for (const Buffer& buffer : binding.buffers.all) {
        const auto value =
            tensor(memory, buffer.address, buffer.bytes(), buffer.shape(), element_type(buffer.dtype));
        require(api_, api_.BindInput(binding.io.get(), buffer.past.c_str(), value.get()));
        require(api_, api_.BindOutput(binding.io.get(), buffer.present.c_str(), value.get()));
      }
      binding.generation = binding.buffers.generation;
    }
    if (binding.tokens == call.tokens && binding.rows == call.logits) return;
    binding.tokens = 0;
    const auto tokens = static_cast<std::size_t>(call.tokens), rows = static_cast<std::size_t>(call.logits);
    binding.input_ids.resize(tokens), binding.position_ids.resize(tokens), binding.logits_index.resize(rows);
    if (rows * static_cast<std::size_t>(manifest_.vocab_size) > binding.logits.size()) {
      binding.logits.resize(rows * static_cast<std::size_t>(manifest_.vocab_size));
    }
    bind_tokens(binding);
    const auto value =
        tensor(host_memory_.get(), binding.logits.data(), binding.logits.size() * sizeof(float),
               {1, call.logits, manifest_.vocab_size}, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    require(api_, api_.BindOutput(binding.io.get(), "logits", value.get()));
    binding.tokens = call.tokens, binding.rows = call.logits;
  }

  void bind_tokens(OrtBinding& binding) const {
    const auto bind = [&](const char* name, std::int64_t* values, const std::vector<std::int64_t>& shape) {
      const std::size_t bytes = static_cast<std::size_t>(shape.back()) * sizeof(std::int64_t);
      const auto value =
          tensor(host_memory_.get(), values, bytes, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
      require(api_, api_.BindInput(binding.io.get(), name, value.get()));
    };
    const auto tokens = static_cast<std::int64_t>(binding.input_ids.size());
    bind("input_ids", binding.input_ids.data(), {1, tokens});
    bind("position_ids", binding.position_ids.data(), {1, tokens});
    bind("write_indices", &binding.write_index, {1});
    bind("logits_index", binding.logits_index.data(),
         {1, static_cast<std::int64_t>(binding.logits_index.size())});
  }

  const OrtApi& api_;
  const Manifest manifest_;
  std::string provider_, version_;
  Owned<OrtEnv> env_{nullptr, nullptr};
  Owned<OrtMemoryInfo> host_memory_{nullptr, nullptr}, device_memory_{nullptr, nullptr};
  Owned<OrtRunOptions> shrinking_{nullptr, nullptr};
  std::unique_ptr<Storage> storage_;
  Owned<OrtSession> session_{nullptr, nullptr};
  std::size_t weights_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Engine> open_onnxruntime(const Bundle& bundle, const std::string& provider, int threads) {
  if (bundle.manifest.dtype == Dtype::bfloat16 && provider == "cpu") {
    throw Failure(
        Code::cannot_run_here,
        "the dtype must be float32 or float16 for ONNX Runtime on the CPU, which has no bfloat16 kernels",
        bundle.path + ", dtype bfloat16", "",
        "build it with --dtype float32 or float16; `kvexport validate` still works here: it computes in "
        "float32");
  }
  return std::make_unique<OrtEngine>(bundle, provider, threads);
}

}  // namespace kvexport::detail
