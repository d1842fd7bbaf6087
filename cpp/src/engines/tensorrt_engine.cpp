// A TensorRT engine of the bundle (TensorRT 10.3 to 11.x and TensorRT-RTX). Each cache has two execution
// contexts, for decode and prefill, which share one scratch memory. The graph has one of two forms: std24
// writes the cache in place; decomposed17 outputs the new keys and values, which are copied into the cache
// after the call, into the slots that the graph names if layers evict, else into the slots of their
// positions, modulo the slots of the layer.
//
// Not yet run on a GPU. The tests (tests/gpu) run it on a TensorRT and a driver that are simulated in host
// memory and compute the graph with ONNX Runtime.
#ifdef KVEXPORT_HAS_TENSORRT

#include <algorithm>
#include <cassert>
#include <cstring>
#include <map>
#include <utility>

#include "bundle/bundle.hpp"
#include "bundle/sha256.hpp"
#include "engines/cuda_driver.hpp"
#include "engines/engine.hpp"
#include "engines/tensorrt_loading.hpp"

namespace kvexport::detail {

namespace {

constexpr int DECODE = 0, PREFILL = 1;  // optimization profiles
constexpr std::size_t ALIGNMENT = 256;

std::size_t aligned(std::size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

char* at(void* address, std::size_t offset) { return static_cast<char*>(address) + offset; }

// Bytes of the engine's weights; 0 if this TensorRT version does not report them.
template <typename Engine, typename Stat>
std::int64_t first_stat(const Engine& engine, std::int64_t (Engine::*read)(Stat) const noexcept) {
  return (engine.*read)(static_cast<Stat>(0));  // EngineStat::kTOTAL_WEIGHTS_SIZE
}
template <typename Engine>
auto weights_of(const Engine& engine, int) -> decltype(first_stat(engine, &Engine::getEngineStat)) {
  return first_stat(engine, &Engine::getEngineStat);
}
template <typename Engine>
std::int64_t weights_of(const Engine&, long) {
  return 0;
}

// TensorRT-RTX reports whether its kernels are compiled. TensorRT requires one run before, which there was.
template <typename Context>
auto can_be_captured(Context& context, CUstream_st* stream, int)
    -> decltype(context.isStreamCapturable(stream)) {
  return context.isStreamCapturable(stream);
}
template <typename Context>
bool can_be_captured(Context&, CUstream_st*, long) {
  return true;
}

// An execution context and its configuration.
struct Context {
#ifdef TRT_MAJOR_RTX
  std::unique_ptr<nvinfer1::IRuntimeConfig> config;
#endif
  std::unique_ptr<nvinfer1::IExecutionContext> context;
};

// Outputs of a graph that does not write the cache. All caches share this memory, since calls are serialized.
struct Updates {
  std::unique_ptr<CudaArray> memory, slots;    // slots: int64, read by the host
  std::map<std::string, std::size_t> offsets;  // offsets in `memory`, by cache input name
  std::map<int, std::size_t> slots_offsets;    // offsets in `slots`, by layer
};

// Calls of one profile: its context and all arrays but the caches. A call allocates memory only if it returns
// more logits than any call before. After the first decode step, the upload, the engine and the downloads are
// captured as a CUDA graph. Copies into the cache are not captured, since their target changes with every
// step.
class Calls {
 public:
  // `addresses`: memory of the other tensors, by name.
  Calls(const LoadedEngine& loaded, CudaDevice& device, Context context, const CudaArray* host_output,
        std::int64_t vocab, std::int64_t max_tokens_per_call, bool captures,
        const std::map<std::string, void*>& addresses)
      : loaded_(loaded),
        device_(device),
        context_(std::move(context)),
        host_output_(host_output),
        vocab_(static_cast<std::size_t>(vocab)),
        room_(aligned(static_cast<std::size_t>(max_tokens_per_call) * sizeof(std::int64_t))),
        captures_(captures),
        inputs_(device, room_ * std::size(TOKEN_INPUTS), true) {
    for (const auto& [name, address] : addresses) bind(name, address);
    for (std::size_t index = 0; index < std::size(TOKEN_INPUTS); ++index)
      bind(TOKEN_INPUTS[index], at(inputs_.address(), index * room_));
  }

  // `after` queues work behind the engine.
  template <typename After>
  const float* run(const Call& call, After after) {
    resize(call.tokens, call.logits);
    stage(0, call.input_ids, call.tokens);
    stage(1, call.position_ids, call.tokens);
    stage(2, &call.write_index, 1);
    stage(3, call.logits_index, call.logits);
    if (graph_ == nullptr) {
      queue();
    } else {
      device_.launch(*graph_);
    }
    if (host_output_ != nullptr) device_.synchronize();
    after();
    device_.synchronize();
    if (captures_ && graph_ == nullptr && can_be_captured(*context_.context, device_.stream(), 0)) {
      graph_ = device_.capture([this] { queue(); });
      captures_ = graph_ != nullptr;
    }
    return logits_->host<float>();
  }

 private:
  void stage(std::size_t input, const std::int64_t* values, std::int64_t count) {
    std::memcpy(at(inputs_.host<char>(), input * room_), values,
                static_cast<std::size_t>(count) * sizeof *values);
  }

  void queue() {
    device_.upload(inputs_.address(), inputs_.host<char>(), inputs_.bytes());
    if (!context_.context->enqueueV3(device_.stream()))
      throw loaded_.failure("TensorRT failed to run the engine");
    device_.download(logits_->host<char>(), logits_->address(),
                     static_cast<std::size_t>(logits_count_) * vocab_ * sizeof(float));
    if (host_output_ != nullptr)
      device_.download(host_output_->host<char>(), host_output_->address(), host_output_->bytes());
  }

  void resize(std::int64_t tokens, std::int64_t logits) {
    if (tokens == tokens_ && logits == logits_count_) return;
    tokens_ = 0;  // invalid until all steps succeeded
    for (const auto& [name, count] :
         {std::pair{"input_ids", tokens}, {"position_ids", tokens}, {"logits_index", logits}}) {
      nvinfer1::Dims shape{};
      shape.nbDims = 2, shape.d[0] = 1, shape.d[1] = count;
      if (!context_.context->setInputShape(name, shape))
        throw loaded_.failure("the engine refuses " + std::to_string(count) + " as a size of " + name);
    }
    const std::size_t bytes = static_cast<std::size_t>(logits) * vocab_ * sizeof(float);
    if (logits_ == nullptr || logits_->bytes() < bytes) {
      logits_.reset();  // released before the larger one is allocated
      logits_ = std::make_unique<CudaArray>(device_, bytes, true);
      bind("logits", logits_->address());
    }
    tokens_ = tokens, logits_count_ = logits;
  }

  void bind(const std::string& name, void* address) {
    if (!context_.context->setTensorAddress(name.c_str(), address))
      throw loaded_.failure("TensorRT refuses the address of " + name);
  }

  const LoadedEngine& loaded_;
  CudaDevice& device_;
  Context context_;
  const CudaArray* host_output_;  // slots that the host reads after the call; null if there are none
  std::size_t vocab_, room_;
  bool captures_;
  CudaArray inputs_;  // all token inputs, `room_` bytes each
  std::unique_ptr<CudaArray> logits_;
  std::int64_t tokens_ = 0, logits_count_ = 0;
  std::unique_ptr<CudaDevice::Graph> graph_;  // destroyed before the arrays that it uses
};

// Contexts belong to one cache: a captured graph contains the addresses of one cache, and a context must not
// be changed after a graph was captured from it (TensorRT developer guide, "CUDA Graphs").
struct TensorRtBinding final : Binding {
  TensorRtBinding(const Buffers& buffers, CudaDevice& device) : buffers(buffers), device(device) {}
  ~TensorRtBinding() override {
    const CudaDevice::ContextLock lock(device);
    prefill.reset(), decode.reset();
  }
  const Buffers& buffers;
  CudaDevice& device;
  std::unique_ptr<Calls> decode, prefill;
};

class TensorRtEngine final : public Engine {
 public:
  TensorRtEngine(const Bundle& bundle, std::shared_ptr<CudaDevice> device, BuildRecord record)
      : manifest_(bundle.manifest),
        device_(std::move(device)),
        storage_(device_),
        record_(std::move(record)) {
    const CudaDevice::ContextLock lock(*device_);
    loaded_ = load_engine(record_);
    require_contract(loaded_, record_, manifest_);
    const EngineLibrary library = tensorrt_library();
    version_ = library.name + " " + library.version;
    // the maximum over all profiles
    const std::int64_t scratch = loaded_.engine->getDeviceMemorySizeV2();
    scratch_ = std::make_unique<CudaArray>(
        *device_, static_cast<std::size_t>(std::max<std::int64_t>(scratch, 1)), false);
    if (!writes_in_place(record_)) make_updates();
  }
  ~TensorRtEngine() override {
    const CudaDevice::ContextLock lock(*device_);
    loaded_.engine.reset(), loaded_.runtime.reset();
  }

  const std::string& provider() const override { return provider_; }
  const std::string& version() const override { return version_; }
  Dtype computes_in() const override { return manifest_.dtype; }
  Storage& storage() override { return storage_; }
  std::int64_t max_tokens_per_call() const override { return record_.chunk; }
  std::int64_t capacity() const override { return record_.capacity; }
  bool has_fixed_capacity() const override { return true; }
  std::int64_t growth_step() const override { return 0; }

  DeviceMemory device_memory() const override {
    DeviceMemory memory = device_->memory();
    memory.weights = static_cast<std::size_t>(std::max<std::int64_t>(weights_of(*loaded_.engine, 0), 0));
    memory.activations = scratch_->bytes();
    return memory;
  }

  std::unique_ptr<Binding> bind(Buffers& buffers) override {
    assert(buffers.capacity == record_.capacity && buffers.layout_tokens == record_.capacity);
    const CudaDevice::ContextLock lock(*device_);
    std::map<std::string, void*> addresses;
    for (const Buffer& buffer : buffers.all) {
      addresses[buffer.past] = buffer.address;
      if (writes_in_place(record_)) {
        addresses[buffer.present] = buffer.address;
      } else {
        addresses[update_of(buffer.past)] = at(updates_.memory->address(), updates_.offsets.at(buffer.past));
      }
    }
    for (const auto& [layer, offset] : updates_.slots_offsets)
      addresses[slots_of(layer)] = at(updates_.slots->address(), offset);
    auto binding = std::make_unique<TensorRtBinding>(buffers, *device_);
    const auto calls = [&](int profile, std::int64_t max_tokens_per_call, bool captures) {
      return std::make_unique<Calls>(loaded_, *device_, context(profile), updates_.slots.get(),
                                     manifest_.vocab_size, max_tokens_per_call, captures, addresses);
    };
    binding->decode = calls(DECODE, 1, true);
    binding->prefill = calls(PREFILL, record_.chunk, false);
    return binding;
  }

  const float* run(Binding& binding, const Call& call) override {
    auto& bound = static_cast<TensorRtBinding&>(binding);
    const std::int64_t start = call.position_ids[0], stop = start + call.tokens;
    if (call.tokens < 1 || call.tokens > record_.chunk || start < 0 ||
        stop > record_.capacity)  // TensorRT does not check this
      throw Failure(
          Code::usage, "the tokens must fit the engine's capacity", std::to_string(stop) + " tokens",
          "at most " + std::to_string(record_.capacity) + ", " + std::to_string(record_.chunk) + " at a time",
          "shorten the text, or build the engine again: kvexport engine BUNDLE --capacity TOKENS --force");
    const CudaDevice::ContextLock lock(*device_);
    Calls& calls = call.tokens == 1 && call.logits == 1 ? *bound.decode : *bound.prefill;
    return calls.run(call, [&] {
      if (!writes_in_place(record_)) write_updates(bound.buffers, start, call.tokens);
    });
  }

 private:
  void make_updates() {
    std::size_t bytes = 0, slots_bytes = 0;
    for (Buffer& buffer : buffers_of(manifest_, {record_.capacity, record_.chunk})) {
      buffer.slots = record_.chunk;
      updates_.offsets[buffer.past] = bytes;
      bytes += aligned(buffer.bytes());
      if (buffer.which != Which::state) continue;
      updates_.slots_offsets[buffer.layer] = slots_bytes;
      slots_bytes += aligned(static_cast<std::size_t>(buffer.heads) * sizeof(std::int64_t));
    }
    updates_.memory = std::make_unique<CudaArray>(*device_, bytes, false);
    if (slots_bytes > 0) updates_.slots = std::make_unique<CudaArray>(*device_, slots_bytes, true);
  }

  // Creates an execution context for one profile, on the shared scratch memory.
  Context context(int profile) {
    Context result;
    const auto strategy = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#ifdef TRT_MAJOR_RTX
    // TensorRT-RTX compiles kernels for a shape when it first occurs. The decode step waits for them, because
    // a captured graph would keep the slower fallback kernels. Prompts, which have many lengths, do not wait.
    result.config.reset(loaded_.engine->createRuntimeConfig());
    result.config->setExecutionContextAllocationStrategy(strategy);
    if (profile == DECODE)
      result.config->setDynamicShapesKernelSpecializationStrategy(
          nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    result.context.reset(loaded_.engine->createExecutionContext(result.config.get()));
#else
    result.context.reset(loaded_.engine->createExecutionContext(strategy));
#endif
    if (result.context == nullptr || !result.context->setOptimizationProfileAsync(profile, device_->stream()))
      throw loaded_.failure("TensorRT cannot make an execution context");
    device_->synchronize();
    result.context->setDeviceMemoryV2(scratch_->address(), static_cast<std::int64_t>(scratch_->bytes()));
    return result;
  }

  // Queues copies of `count` new tokens from the graph's outputs into the cache. In a layer that evicts they
  // go to the slots that the graph named, consecutive heads with the same slot in one copy; in other layers
  // to the slots from that of position `start` on.
  void write_updates(const Buffers& buffers, std::int64_t start, std::int64_t count) {
    for (const Buffer& buffer : buffers.all) {
      const char* source = at(updates_.memory->address(), updates_.offsets.at(buffer.past));
      const std::int64_t* slots = nullptr;
      if (buffer.evicts)
        slots = reinterpret_cast<std::int64_t*>(
            at(updates_.slots->host<char>(), updates_.slots_offsets.at(buffer.layer)));
      const std::size_t slot = buffer.slot_bytes();
      const auto pitch = static_cast<std::size_t>(buffer.slots) * slot,
                 run = static_cast<std::size_t>(count) * slot;
      for (std::int64_t first = 0, next = 0; first < buffer.heads; first = next) {
        const std::int64_t target = slots == nullptr ? start % buffer.slots : slots[first];
        for (next = first + 1; next < buffer.heads && (slots == nullptr || slots[next] == target);) ++next;
        if (target < 0 || target + count > buffer.slots)
          throw loaded_.failure("the engine returned a slot that does not exist: " + std::to_string(target) +
                                " of " + buffer.past);
        char* to = at(buffer.address,
                      static_cast<std::size_t>(first) * pitch + static_cast<std::size_t>(target) * slot);
        device_->copy_rows(to, pitch, source + static_cast<std::size_t>(first) * run, run, run,
                           static_cast<std::size_t>(next - first));
      }
    }
  }

  const std::string provider_ = "tensorrt";
  const Manifest manifest_;
  std::shared_ptr<CudaDevice> device_;
  CudaStorage storage_;
  BuildRecord record_;
  std::string version_;
  LoadedEngine loaded_;
  std::unique_ptr<CudaArray> scratch_;
  Updates updates_;
};

}  // namespace

std::unique_ptr<Engine> open_tensorrt(const Bundle& bundle, bool verify) {
  auto device = std::make_shared<CudaDevice>();
  BuildRecord record =
      choose_engine(bundle, device->name(), device->compute_capability(), tensorrt_library());
  if (verify) record.verify();
  return std::make_unique<TensorRtEngine>(bundle, std::move(device), std::move(record));
}

}  // namespace kvexport::detail

#endif
