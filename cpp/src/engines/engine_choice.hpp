// The engines in a bundle, and which of them this machine can run; reads their records and loads none of
// them. Knows no TensorRT.
#pragma once

#include <string>

#include "bundle/bundle.hpp"
#include "bundle/engine_record.hpp"

namespace kvexport::detail {

// What this library was built with: plans are bound to the version that built them.
struct EngineLibrary {
  std::string name, version;  // "tensorrt" or "tensorrt-rtx"; "10.3.0"
};

// The first of the bundle's engines, by the names of their folders, that runs on a GPU of this name and
// compute capability. Its plan is not hashed. Throws Failure: there is none, or none that fits, with what is
// wrong with each; the first that would run was built from another bundle; a record is damaged.
BuildRecord choose_engine(const Bundle& bundle, const std::string& gpu, const std::string& compute_capability,
                          const EngineLibrary& library);

}  // namespace kvexport::detail
