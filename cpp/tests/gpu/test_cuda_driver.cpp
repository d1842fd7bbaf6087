// CudaDevice on the simulated driver: contents, order, error messages, and release of everything.
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "../check.hpp"
#include "bundle/error.hpp"
#include "engines/cuda_driver.hpp"
#include "fake_cuda.hpp"

using namespace kvexport::detail;

extern "C" int cuCtxPopCurrent_v2(void** context);
extern "C" int cuCtxPushCurrent_v2(void* context);

namespace {

std::vector<unsigned char> counted(std::size_t count) {
  std::vector<unsigned char> bytes(count);
  std::iota(bytes.begin(), bytes.end(), static_cast<unsigned char>(1));
  return bytes;
}

void require_nothing_left() {
  const fake_cuda::Counts left = fake_cuda::counts();
  CHECK_EQUAL(left.used + left.contexts + left.streams + left.graphs + left.pinned, std::size_t{0});
  CHECK(!fake_cuda::has_context());
  CHECK_EQUAL(fake_cuda::broken(), std::string());
}

}  // namespace

TEST(reads_and_releases_the_device) {
  fake_cuda::reset();
  {
    CudaDevice device;
    CHECK_EQUAL(device.name(), std::string("Simulated 0"));
    CHECK_EQUAL(device.compute_capability(), std::string("8.7"));
    CHECK_EQUAL(device.memory().total, std::size_t{1} << 30);
    CHECK_EQUAL(fake_cuda::counts().contexts, std::size_t{1});
  }
  require_nothing_left();
}

TEST(distinguishes_no_driver_no_device_and_an_old_driver) {
  fake_cuda::reset();
  CHECK_THROWS_WITH(CudaDevice("libno-such-driver.so.1"), "there is no NVIDIA driver on this machine");
  CHECK_THROWS_WITH(CudaDevice("libno-such-driver.so.1"), "libno-such-driver.so.1");
  CHECK_THROWS_WITH(CudaDevice("libm.so.6"), "it has no cuInit");
  fake_cuda::settings().devices = 0;
  CHECK_THROWS_WITH(CudaDevice(), "CUDA finds no GPU\n  got:      0 devices");
  require_nothing_left();
}

TEST(memory_operations_run_in_order) {
  fake_cuda::reset();
  {
    const auto storage = open_cuda_storage();
    CHECK(!storage->is_host());
    auto* memory = static_cast<unsigned char*>(storage->allocate(48));
    CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(memory) % 256, std::uintptr_t{0});
    std::vector<unsigned char> seen(48, 7);
    storage->download(seen.data(), memory, 48);
    CHECK_EQUAL(seen[0], 7);  // queued but not run, which proves that the simulation is asynchronous
    storage->synchronize();
    CHECK(seen == std::vector<unsigned char>(48, 0));
    const std::vector<unsigned char> bytes = counted(24);
    storage->upload(memory, bytes.data(), 24);
    storage->copy_rows(memory + 24, 8, memory, 6, 6, 3);  // three rows of 6 bytes, 8 bytes apart
    storage->clear(memory, 2);
    storage->download(seen.data(), memory, 48);
    storage->synchronize();
    CHECK(seen[0] == 0 && seen[1] == 0 && seen[2] == 3);
    for (std::size_t row = 0; row < 3; ++row) {
      CHECK(std::memcmp(seen.data() + 24 + row * 8, bytes.data() + row * 6, 6) == 0);
      CHECK(seen[24 + row * 8 + 6] == 0 && seen[24 + row * 8 + 7] == 0);
    }
    CHECK_EQUAL(storage->device_memory().free, (std::size_t{1} << 30) - 48);
    storage->release(memory);
  }
  require_nothing_left();
}

TEST(out_of_memory_reports_free_and_total_bytes) {
  fake_cuda::reset();
  fake_cuda::settings().total = 1000;
  {
    const auto storage = open_cuda_storage();
    CHECK_THROWS_WITH(storage->allocate(1001), "Simulated 0 must have 1001 bytes of free memory");
    CHECK_THROWS_WITH(storage->allocate(1001), "got:      1000 of 1000 bytes are free");
    void* fits = storage->allocate(1000);
    storage->release(fits);
  }
  require_nothing_left();
}

TEST(errors_include_the_cuda_error_name) {
  fake_cuda::reset();
  const auto storage = open_cuda_storage();
  char beyond[16];
  storage->clear(beyond, 16);  // host memory
  CHECK_THROWS_WITH(storage->synchronize(),
                    "CUDA failed on Simulated 0\n  got:      CUDA_ERROR_ILLEGAL_ADDRESS");
  fake_cuda::reset();
}

TEST(a_shut_down_driver_causes_errors_only) {
  fake_cuda::reset();
  {
    const auto storage = open_cuda_storage();
    const CudaArray array(storage->device(), 8, true);
    fake_cuda::settings().ended = true;
    CHECK_THROWS_WITH(storage->allocate(8), "CUDA_ERROR_INVALID_CONTEXT");
  }  // release fails too, and throws nothing
  CHECK(!fake_cuda::has_context());
  fake_cuda::reset();
}

TEST(a_graph_repeats_the_captured_work) {
  fake_cuda::reset();
  {
    CudaDevice device;
    CudaArray array(device, 8, true);
    std::vector<unsigned char> seen(8, 9);
    fake_cuda::done();
    std::memset(array.host<char>(), 1, 8);
    const auto graph = device.capture([&] {
      device.upload(array.address(), array.host<char>(), 8);
      device.download(seen.data(), array.address(), 8);
    });
    CHECK(graph != nullptr);
    device.synchronize();
    CHECK(fake_cuda::done().empty() && seen[0] == 9);
    for (unsigned char value = 2; value < 5; ++value) {
      std::memset(array.host<char>(), value, 8);
      device.launch(*graph);
      device.synchronize();
      CHECK_EQUAL(seen[7], value);
    }
    CHECK_EQUAL(fake_cuda::done().size(), std::size_t{9});  // "launch" and two operations, three times
  }
  require_nothing_left();
}

TEST(a_failed_capture_leaves_the_stream_usable) {
  fake_cuda::reset();
  {
    CudaDevice device;
    CHECK(device.capture([&] { device.synchronize(); }) == nullptr);
    CHECK(device.capture([&] { device.release(device.allocate(8)); }) == nullptr);
    CHECK(device.capture([&] { throw Failure(Code::cannot_run_here, "it would not"); }) == nullptr);
    CHECK_THROWS_WITH(device.capture([] { throw std::runtime_error("another"); }), "another");
    fake_cuda::settings().capturable = false;
    CHECK(device.capture([] {}) == nullptr);
    fake_cuda::settings().capturable = true;
    CHECK(device.capture([] {}) != nullptr);
    device.synchronize();
  }
  require_nothing_left();
}

TEST(the_context_of_the_caller_stays_current) {
  fake_cuda::reset();
  char callers;
  cuCtxPushCurrent_v2(&callers);
  {
    CudaDevice device;
    const CudaArray array(device, 64, true);
    device.clear(array.address(), 64);
    const CudaDevice::ContextLock lock(device);
    device.synchronize();
  }
  void* current = nullptr;
  CHECK_EQUAL(cuCtxPopCurrent_v2(&current), 0);
  CHECK(current == &callers);
  require_nothing_left();
}

TEST(threads_wait_during_a_capture) {
  fake_cuda::reset();
  {
    CudaDevice device;
    CudaArray array(device, 8, false);
    fake_cuda::done();
    std::thread other;
    const auto graph = device.capture([&] {
      other = std::thread([&] { device.clear(array.address(), 8); });
      device.clear(array.address(), 4);
    });
    other.join();
    CHECK(graph != nullptr);
    device.synchronize();
    CHECK_EQUAL(fake_cuda::done().size(), std::size_t{1});  // of the other thread, not captured
    device.launch(*graph);
    device.synchronize();
    CHECK_EQUAL(fake_cuda::done().size(), std::size_t{2});
  }
  require_nothing_left();
}
