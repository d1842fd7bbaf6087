// What tests and the simulated TensorRT ask of the simulated driver (fake_cuda.cpp), beside CUDA's own
// functions.
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
  bool capturable = true, ended = false;  // ended: the process is, and the driver is gone before its callers
};

struct Counts {
  std::size_t used = 0, allocations = 0, contexts = 0, streams = 0, graphs = 0, pinned = 0;
};

// As of a machine that was just started; `settings` may be changed afterwards too.
void reset();
Settings& settings();
Counts counts();

// Names of the operations, in the order in which they were done; asking empties it.
std::vector<std::string> done();

// Leave out the operation of this index, counted from 0, of every graph that is launched; -1: none. A wrong
// driver, for negative controls.
void leave_out(int operation);

// What broke a rule of CUDA's, as the error that the stream then gives says nothing of it.
std::string broken();

// For the simulated TensorRT. All but `enqueue` are false, and break the stream, where `bytes` are not all in
// one allocation.
bool is_memory(const void* address, std::size_t bytes);
bool capturing(CUstream_st* stream);
bool has_context();
void enqueue(CUstream_st* stream, const std::string& name, std::function<void()> work);
void break_stream(const std::string& reason);
void* take_memory(std::size_t bytes);
void give_memory(void* address);

}  // namespace fake_cuda
