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
  const OrtApi* table = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (table == nullptr) {
    throw Failure(Code::cannot_run_here, "ONNX Runtime must be version 1.28 or later",
                  OrtGetApiBase()->GetVersionString(), "1.28 or later",
                  "replace libonnxruntime.so.1 by a newer one");
  }
  return *table;
}

// The error message of a call; "" if it succeeded.
inline std::string error_message(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return {};
  const std::unique_ptr<OrtStatus, decltype(api.ReleaseStatus)> owned(status, api.ReleaseStatus);
  const std::string message = api.GetErrorMessage(status);
  return message.empty() ? "no reason given" : message;
}

inline void require(const OrtApi& api, OrtStatus* status,
                    const char* failed = "a call of ONNX Runtime failed") {
  if (status == nullptr) return;
  throw Failure(Code::cannot_run_here, failed, error_message(api, status),
                "onnxruntime 1.28 or later, and an undamaged bundle",
                "check the bundle: kvexport inspect --verify BUNDLE");
}

template <typename Object>
using Owned = std::unique_ptr<Object, void(ORT_API_CALL*)(Object*)>;

// Calls a function that creates an object in its last argument.
template <typename Object, typename Function, typename... Arguments>
Owned<Object> make(const OrtApi& api, void(ORT_API_CALL* release)(Object*), Function function,
                   Arguments&&... arguments) {
  Object* object = nullptr;
  require(api, function(std::forward<Arguments>(arguments)..., &object));
  return Owned<Object>(object, release);
}

}  // namespace kvexport::detail::ort
