// Replaces tensorrt_engine.cpp in builds without TensorRT.
#ifndef KVEXPORT_HAS_TENSORRT

#include "bundle/error.hpp"
#include "engines/engine.hpp"

namespace kvexport::detail {

std::unique_ptr<Engine> open_tensorrt(const Bundle&, bool) {
  throw Failure(Code::cannot_run_here, "this libkvexport was built without TensorRT", "",
                "provider \"cpu\" or \"cuda\"",
                "build it where NvInfer.h is: cmake -DKVEXPORT_TENSORRT=ON -DTENSORRT_ROOT=FOLDER");
}

}  // namespace kvexport::detail

#endif
