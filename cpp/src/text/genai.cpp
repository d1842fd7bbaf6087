#include "text/genai.hpp"

#include <dlfcn.h>

#include <mutex>
#include <nlohmann/json.hpp>

#include "bundle/error.hpp"

namespace kvexport::detail {
namespace {

// Declarations from onnxruntime-genai's ort_genai_c.h; the types are opaque.
struct OgaResult;
struct OgaTokenizer;
struct OgaSequences;

constexpr const char* install =
    "pip download --no-deps onnxruntime-genai-core==0.18.0 and unpack it (or take onnxruntime-genai's "
    "release archive 0.18.0), "
    "and name its libonnxruntime-genai.so: OpenOptions::text_library; token ids need none";

template <typename Function>
void find(void* handle, const char* name, Function*& function, const std::string& library) {
  function = reinterpret_cast<Function*>(dlsym(handle, name));
  if (function == nullptr)
    throw Failure(Code::cannot_run_here,
                  library + " must be a supported version of onnxruntime-genai: it has no " + name, "", "",
                  install);
}

// onnxruntime-genai ends the process if it finds no ONNX Runtime when it is opened, so check that first.
void require_onnxruntime() {
  for (const char* name : {"libonnxruntime.so.1", "libonnxruntime.so"})
    if (void* loaded = dlopen(name, RTLD_NOW | RTLD_NOLOAD); loaded != nullptr) {
      dlclose(loaded);
      return;
    }
  throw Failure(Code::cannot_run_here,
                "the tokenizer library requires the shared library libonnxruntime.so.1", "", "",
                "link the program with the shared libonnxruntime.so.1, or leave text out: "
                "OpenOptions::text_library = \"\"");
}

}  // namespace

struct GenaiTokenizer::Library {
  void* handle = nullptr;
  OgaTokenizer* tokenizer = nullptr;
  std::mutex mutex;  // the API is not thread-safe

  OgaResult* (*create)(const char*, OgaTokenizer**) = nullptr;
  void (*destroy)(OgaTokenizer*) = nullptr;
  OgaResult* (*update)(OgaTokenizer*, const char* const*, const char* const*, std::size_t) = nullptr;
  OgaResult* (*encode)(const OgaTokenizer*, const char*, OgaSequences*) = nullptr;
  OgaResult* (*decode)(const OgaTokenizer*, const std::int32_t*, std::size_t, const char**) = nullptr;
  OgaResult* (*create_sequences)(OgaSequences**) = nullptr;
  void (*destroy_sequences)(OgaSequences*) = nullptr;
  std::size_t (*sequence_count)(const OgaSequences*, std::size_t) = nullptr;
  const std::int32_t* (*sequence_data)(const OgaSequences*, std::size_t) = nullptr;
  void (*destroy_string)(const char*) = nullptr;
  const char* (*result_error)(const OgaResult*) = nullptr;
  void (*destroy_result)(OgaResult*) = nullptr;

  explicit Library(const std::string& library) {
    require_onnxruntime();
    // Never unloaded: ONNX Runtime, which it loads, cannot be opened a second time.
    handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) {
      const char* reason = dlerror();
      throw Failure(Code::cannot_run_here, "the tokenizer library cannot be opened",
                    reason == nullptr ? library : reason, "", install);
    }
    try {
      find(handle, "OgaCreateTokenizerFromPath", create, library);
      find(handle, "OgaDestroyTokenizer", destroy, library);
      find(handle, "OgaUpdateTokenizerOptions", update, library);
      find(handle, "OgaTokenizerEncode", encode, library);
      find(handle, "OgaTokenizerDecode", decode, library);
      find(handle, "OgaCreateSequences", create_sequences, library);
      find(handle, "OgaDestroySequences", destroy_sequences, library);
      find(handle, "OgaSequencesGetSequenceCount", sequence_count, library);
      find(handle, "OgaSequencesGetSequenceData", sequence_data, library);
      find(handle, "OgaDestroyString", destroy_string, library);
      find(handle, "OgaResultGetError", result_error, library);
      find(handle, "OgaDestroyResult", destroy_result, library);
    } catch (...) {
      dlclose(handle);
      throw;
    }
  }

  ~Library() {
    if (tokenizer != nullptr) destroy(tokenizer);
    dlclose(handle);
  }

  void require(OgaResult* result, const char* doing) const {
    if (result == nullptr) return;
    const char* message = result_error(result);
    const std::string reason = message == nullptr ? "" : message;
    destroy_result(result);
    throw Failure(Code::cannot_run_here, std::string("onnxruntime-genai cannot ") + doing, reason, "",
                  "use token ids, which need no tokenizer");
  }
};

GenaiTokenizer::GenaiTokenizer(const std::string& folder, const std::string& library)
    : library_(std::make_unique<Library>(library)) {
  Library& genai = *library_;
  genai.require(genai.create(folder.c_str(), &genai.tokenizer), "read the bundle's tokenizer");
  const char* const keys[] = {"add_special_tokens", "skip_special_tokens"};
  const char* const values[] = {"false", "true"};
  genai.require(genai.update(genai.tokenizer, keys, values, 2), "leave out special tokens");
}

GenaiTokenizer::~GenaiTokenizer() = default;

std::vector<std::int64_t> GenaiTokenizer::encode(const std::string& text) const {
  if (text.find('\0') != std::string::npos)
    throw Failure(Code::usage, "the text must not contain a NUL character", "", "", "remove it");
  try {
    (void)nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    throw Failure(Code::usage, "the text must be valid UTF-8", "", "", "convert it to UTF-8");
  }
  const Library& genai = *library_;
  const std::lock_guard<std::mutex> lock(library_->mutex);
  OgaSequences* raw = nullptr;
  genai.require(genai.create_sequences(&raw), "encode text");
  const std::unique_ptr<OgaSequences, void (*)(OgaSequences*)> sequences(raw, genai.destroy_sequences);
  genai.require(genai.encode(genai.tokenizer, text.c_str(), raw), "encode text");
  const std::size_t count = genai.sequence_count(raw, 0);
  const std::int32_t* ids = genai.sequence_data(raw, 0);
  return {ids, ids + count};
}

std::string GenaiTokenizer::decode(const std::vector<std::int64_t>& ids) const {
  if (ids.empty()) return {};
  const std::vector<std::int32_t> narrow(ids.begin(), ids.end());
  const Library& genai = *library_;
  const std::lock_guard<std::mutex> lock(library_->mutex);
  const char* raw = nullptr;
  genai.require(genai.decode(genai.tokenizer, narrow.data(), narrow.size(), &raw), "decode token ids");
  const std::unique_ptr<const char, void (*)(const char*)> text(raw, genai.destroy_string);
  return text ? std::string(text.get()) : std::string();
}

}  // namespace kvexport::detail
