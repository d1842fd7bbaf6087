// Measures the time of a decode step and the part of it that ONNX Runtime takes; the difference is the
// overhead of this library.
//
//   step_overhead BUNDLE DEPTH STEPS THREADS
//
// The library obtains ONNX Runtime through OrtGetApiBase. This program defines that symbol too, and returns
// ONNX Runtime's function table with a timed RunWithBinding. Prints one JSON object with two arrays in
// microseconds.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>
#include <kvexport/kvexport.hpp>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double inside = 0;  // microseconds in RunWithBinding in the current step
OrtApi timed_api;
const OrtApi* real_api = nullptr;
OrtApiBase timed_base;
const OrtApiBase* real_base = nullptr;

double since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

OrtStatus* ORT_API_CALL timed_run(OrtSession* session, const OrtRunOptions* options,
                                  const OrtIoBinding* binding) noexcept {
  const auto start = Clock::now();
  OrtStatus* status = real_api->RunWithBinding(session, options, binding);
  inside += since(start);
  return status;
}

const OrtApi* ORT_API_CALL timed_get_api(uint32_t version) noexcept {
  real_api = real_base->GetApi(version);
  if (real_api == nullptr) return nullptr;
  timed_api = *real_api;
  timed_api.RunWithBinding = timed_run;
  return &timed_api;
}

void print(const char* name, const std::vector<double>& values) {
  std::cout << '"' << name << "\": [";
  for (std::size_t i = 0; i < values.size(); ++i) std::cout << (i ? ", " : "") << values[i];
  std::cout << ']';
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const OrtApiBase* ORT_API_CALL OrtGetApiBase() noexcept {
  if (real_base == nullptr) {
    real_base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(RTLD_NEXT, "OrtGetApiBase"))();
    timed_base = *real_base;
    timed_base.GetApi = timed_get_api;
  }
  return &timed_base;
}

int main(int argc, char** argv) try {
  if (argc != 5) return std::cerr << "usage: step_overhead BUNDLE DEPTH STEPS THREADS\n", 2;
  const std::int64_t depth = std::stoll(argv[2]), steps = std::stoll(argv[3]);
  kvexport::OpenOptions options;
  options.provider = "cpu", options.threads = std::stoi(argv[4]), options.text_library = "";
  kvexport::Session session(argv[1], options);
  kvexport::Cache cache = session.new_cache(depth + steps + 8);
  cache.prefill(kvexport::Ids(static_cast<std::size_t>(depth), 1));
  std::vector<double> whole, engine;
  std::int64_t token = 1;
  for (std::int64_t step = -8; step < steps; ++step) {  // 8 warm-up steps
    inside = 0;
    const auto start = Clock::now();
    const kvexport::Logits logits = cache.step(token);
    const double took = since(start);
    token = logits.likeliest();
    if (step >= 0) whole.push_back(took), engine.push_back(inside);
  }
  std::cout << '{';
  print("step_us", whole);
  std::cout << ", ";
  print("engine_us", engine);
  std::cout << "}\n";
  return 0;
} catch (const std::exception& error) {
  return std::cerr << error.what() << '\n', 2;
}
