// Replaces tensorrt_engine.cpp in builds without TensorRT.
#ifndef KVEXPORT_HAS_TENSORRT

#include "bundle/error.hpp"
#include "engines/engine.hpp"

namespace kvexport::detail {

std::unique_ptr<Engine> open_tensorrt(const Bundle&, bool) {
  throw Failure(Code::cannot_run_here, "libkvexport must be built with TensorRT for this provider", "",
                "provider \"cpu\" or \"cuda\"",
                "build it again: cmake -DKVEXPORT_TENSORRT=ON -DTENSORRT_ROOT=FOLDER");
}

}  // namespace kvexport::detail

#endif
