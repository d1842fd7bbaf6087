// ONNX Runtime's C API with owning pointers, and with errors as Failure.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>
#include <utility>

#include "bundle/error.hpp"

namespace kvexport::detail::ort {

// ONNX Runtime's function table, which is valid for the whole process. Throws Failure if the library is older
// than the headers.
inline const OrtApi& api() {
  const OrtApi* found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (found == nullptr) {
    throw Failure(Code::cannot_run_here, "ONNX Runtime is too old", OrtGetApiBase()->GetVersionString(),
                  "1.28 or later", "put a newer libonnxruntime.so.1 where this one was found");
  }
  return *found;
}

// The error message of a call; "" if it succeeded.
inline std::string refusal(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return {};
  const std::unique_ptr<OrtStatus, decltype(api.ReleaseStatus)> owned(status, api.ReleaseStatus);
  const std::string said = api.GetErrorMessage(status);
  return said.empty() ? "no reason given" : said;
}

inline void require(const OrtApi& api, OrtStatus* status,
                    const char* failed = "ONNX Runtime refused a call") {
  if (status == nullptr) return;
  throw Failure(Code::cannot_run_here, failed, refusal(api, status),
                "onnxruntime 1.28 or later, and a sound bundle",
                "check the bundle with: kvexport inspect --verify BUNDLE");
}

template <typename Object>
using Owned = std::unique_ptr<Object, void(ORT_API_CALL*)(Object*)>;

// Calls a function that creates an object in its last argument.
template <typename Object, typename Function, typename... Arguments>
Owned<Object> make(const OrtApi& api, void(ORT_API_CALL* release)(Object*), Function function,
                   Arguments&&... arguments) {
  Object* made = nullptr;
  require(api, function(std::forward<Arguments>(arguments)..., &made));
  return Owned<Object>(made, release);
}

}  // namespace kvexport::detail::ort
