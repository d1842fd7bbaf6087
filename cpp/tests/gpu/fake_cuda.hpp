// Control of the simulated driver (fake_cuda.cpp), for tests and for the simulated TensorRT.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

struct CUstream_st;

namespace fake_cuda {

struct Settings {
  std::size_t total = std::size_t{1} << 30;
  int devices = 1, major = 8, minor = 7;
  bool capturable = true, ended = false;  // ended: the driver is shut down, as at the end of a process
};

struct Counts {
  std::size_t used = 0, allocations = 0, contexts = 0, streams = 0, graphs = 0, pinned = 0;
};

// Resets everything to the state of a new process. `settings` may be changed afterwards.
void reset();
Settings& settings();
Counts counts();

// Names of the operations since the last call, in the order in which they ran.
std::vector<std::string> done();

// Skips the operation with this index in every launched graph; -1: none. Simulates a wrong driver, to prove
// that tests detect it.
void leave_out(int operation);

// The rule that was violated; the stream's error code does not tell.
std::string broken();

// For the simulated TensorRT. `is_memory`: whether all `bytes` lie in one allocation of the device.
bool is_memory(const void* address, std::size_t bytes);
bool capturing(CUstream_st* stream);
bool has_context();
void enqueue(CUstream_st* stream, const std::string& name, std::function<void()> work);
void break_stream(const std::string& reason);
void* take_memory(std::size_t bytes);
void give_memory(void* address);

}  // namespace fake_cuda
