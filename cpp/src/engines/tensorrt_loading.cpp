#ifdef KVEXPORT_HAS_TENSORRT

#include "engines/tensorrt_loading.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "runtime/buffers.hpp"

namespace kvexport::detail {

namespace {

constexpr const char* rebuild = "build it again: kvexport engine BUNDLE --force";

struct Tensor {
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::string output;  // present.{i}.key, which shares the memory, or update.{i}.key
  std::string text() const {
    std::string sizes;
    for (std::int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    return std::string(name_of(dtype)) + " [" + sizes + "]";
  }
};

// A read-only mapping, so that the plan is not copied into memory.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size > 0) {
      size_ = static_cast<std::size_t>(status.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    const int error = errno;
    if (file >= 0) close(file);
    if (data_ == MAP_FAILED) throw bundle_error(path + " cannot be read", std::strerror(error), "", rebuild);
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  std::size_t size_ = 0;
};

// TensorRT keeps the first logger while any runtime exists, so all sessions share one logger, which lives as
// long as the last of them.
std::shared_ptr<TensorRtLog> shared_log() {
  static std::mutex mutex;
  static std::weak_ptr<TensorRtLog> weak_log;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<TensorRtLog> log = weak_log.lock();
  if (log == nullptr) weak_log = log = std::make_shared<TensorRtLog>();
  return log;
}

std::map<std::string, Tensor> caches_of(const Manifest& manifest, const BuildRecord& record) {
  std::map<std::string, Tensor> caches;
  for (Buffer& buffer : buffers_of(manifest, {record.capacity, record.chunk})) {
    buffer.slots = buffer.max_slots;
    caches[buffer.past] = {buffer.dtype, buffer.shape(),
                           writes_in_place(record) ? buffer.present : update_of(buffer.past)};
  }
  return caches;
}

// "" for a type that no tensor of a bundle has.
std::string type_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return "float32";
    case nvinfer1::DataType::kHALF: return "float16";
    case nvinfer1::DataType::kBF16: return "bfloat16";
    case nvinfer1::DataType::kINT64: return "int64";
    default: return "";
  }
}

std::string for_message(const nvinfer1::ICudaEngine& engine, const std::string& name) {
  const nvinfer1::Dims dims = engine.getTensorShape(name.c_str());
  std::string sizes;
  for (int axis = 0; axis < dims.nbDims; ++axis)
    sizes += (axis == 0 ? "" : ", ") + std::to_string(dims.d[axis]);
  return type_of(engine.getTensorDataType(name.c_str())) + " [" + sizes + "]";
}

// The input whose memory an output shares, "" if none; no value before TensorRT 10.15, which cannot report
// it.
template <typename Engine>
auto aliased_input(const Engine& engine, const char* output, int)
    -> decltype(engine.getAliasedInputTensor(output), std::optional<std::string>()) {
  const char* input = engine.getAliasedInputTensor(output);
  return input == nullptr ? "" : input;
}
template <typename Engine>
std::optional<std::string> aliased_input(const Engine&, const char*, long) {
  return std::nullopt;
}

[[noreturn]] void refuse(const BuildRecord& record, const std::string& what, const std::string& got,
                         const std::string& expected) {
  throw bundle_error("the engine " + record.directory + " " + what, got, expected, rebuild);
}

}  // namespace

void TensorRtLog::log(Severity severity, const char* message) noexcept {
  if (severity != Severity::kINTERNAL_ERROR && severity != Severity::kERROR) return;
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = message;
  } catch (...) {  // out of memory: the message is dropped
  }
}

std::string TensorRtLog::last() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_;
}

Failure LoadedEngine::failure(const std::string& what) const {
  return {Code::cannot_run_here, what, log->last(), "", rebuild};
}

EngineLibrary tensorrt_library() {
  const int version = getInferLibVersion();
  const std::string number = std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) +
                             "." + std::to_string(version % 100);
#ifdef TRT_MAJOR_RTX
  return {"tensorrt-rtx", number};
#else
  return {"tensorrt", number};
#endif
}

LoadedEngine load_engine(const BuildRecord& record) {
  LoadedEngine loaded;
  loaded.log = shared_log();
  loaded.runtime.reset(nvinfer1::createInferRuntime(*loaded.log));
  if (loaded.runtime == nullptr) throw loaded.failure("TensorRT failed to start");
  const MappedFile plan(record.plan);
  loaded.engine.reset(loaded.runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (loaded.engine == nullptr) {
    const EngineLibrary here = tensorrt_library();
    throw loaded.failure(here.name + " " + here.version + " cannot load " + record.plan);
  }
  return loaded;
}

void require_contract(const LoadedEngine& loaded, const BuildRecord& record, const Manifest& manifest) {
  const nvinfer1::ICudaEngine& engine = *loaded.engine;
  const std::map<std::string, Tensor> caches = caches_of(manifest, record);
  std::set<std::string> expected_names(std::begin(TOKEN_INPUTS), std::end(TOKEN_INPUTS));
  expected_names.insert("logits");
  for (const auto& [name, tensor] : caches) expected_names.insert({name, tensor.output});
  if (!writes_in_place(record)) {
    for (std::size_t layer = 0; layer < manifest.layers.size(); ++layer)
      if (manifest.evicts(static_cast<std::int64_t>(layer)))
        expected_names.insert(slots_of(static_cast<int>(layer)));
  }
  std::set<std::string> names;
  for (int index = 0; index < engine.getNbIOTensors(); ++index) names.insert(engine.getIOTensorName(index));
  if (names != expected_names) {
    std::vector<std::string> other;
    std::set_symmetric_difference(names.begin(), names.end(), expected_names.begin(), expected_names.end(),
                                  std::back_inserter(other));
    refuse(record, "must have the inputs and outputs of its lowering", other.front(),
           "the tensors of its lowering, " + record.lowering);
  }
  for (const std::string& name : names) {
    const char* raw = name.c_str();
    if (engine.getTensorLocation(raw) != nvinfer1::TensorLocation::kDEVICE)
      refuse(record, "must have all tensors in device memory", name, "all on the device");
    const bool input = engine.getTensorIOMode(raw) == nvinfer1::TensorIOMode::kINPUT;
    const bool token =
        std::find(std::begin(TOKEN_INPUTS), std::end(TOKEN_INPUTS), name) != std::end(TOKEN_INPUTS);
    if (input != (token || caches.count(name) != 0))
      refuse(record, "must have the inputs of its lowering", name, "");
  }
  for (const auto& [name, tensor] : caches) {
    if (for_message(engine, name) != tensor.text())
      refuse(record, "must match the bundle in " + name, for_message(engine, name), tensor.text());
    if (!writes_in_place(record)) continue;
    const std::optional<std::string> input = aliased_input(engine, tensor.output.c_str(), 0);
    if (input && *input != name)
      refuse(record, "must write the cache in place",
             input->empty() ? tensor.output + " has its own memory" : *input,
             tensor.output + " shares the memory of " + name);
  }
  const auto require_type = [&](const std::string& name, const char* type) {
    const std::string got = type_of(engine.getTensorDataType(name.c_str()));
    if (got != type) refuse(record, "must match the bundle in the type of " + name, got, type);
  };
  for (const char* name : TOKEN_INPUTS) require_type(name, "int64");
  require_type("logits", "float32");
}

}  // namespace kvexport::detail

#endif
