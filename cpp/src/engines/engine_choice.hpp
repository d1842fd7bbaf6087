// Selection of an engine of the bundle that runs on this machine, from the engines' records.
#pragma once

#include <string>

#include "bundle/bundle.hpp"
#include "bundle/engine_record.hpp"

namespace kvexport::detail {

// The TensorRT library of this build. A plan runs only with the version that built it.
struct EngineLibrary {
  std::string name, version;  // "tensorrt" or "tensorrt-rtx"; e.g. "10.3.0"
};

// The first engine, in the order of directory names, that runs on a GPU with this name and compute
// capability. The plan is not hashed. Throws Failure if there is none, with the reason for each engine; if
// the chosen engine was built from another bundle; or if a record is damaged.
BuildRecord choose_engine(const Bundle& bundle, const std::string& gpu, const std::string& compute_capability,
                          const EngineLibrary& library);

}  // namespace kvexport::detail
