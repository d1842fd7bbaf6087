// The cache of one sequence as an engine sees it: buffers by the names of the graph's inputs, in memory that
// is allocated once. Knows shapes and bytes; what is written to the buffers, and who goes when a budget is
// full, is in `Occupancy` and `Evictor` (eviction.hpp) and in `Cache` (cache.hpp).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bundle/manifest.hpp"
#include "runtime/storage.hpp"

namespace kvexport::detail {

enum class Which { key, value, state };

// One buffer: [1, heads, slots, width], or [heads, 1, slots, width] where its layer evicts: the same bytes
// either way.
struct Buffer {
  std::string past, present;  // names of the graph's input and of the output that is the same memory
  int layer;
  Which which;
  Dtype dtype;  // float32 for a state
  bool evicts;
  std::int64_t heads, width;
  std::int64_t most;       // slots that there is memory for
  std::int64_t slots = 0;  // slots of each head now; the buffer's layout follows it
  void* address = nullptr;

  std::size_t slot_bytes() const { return static_cast<std::size_t>(width) * size_of(dtype); }
  std::size_t bytes() const { return static_cast<std::size_t>(heads * slots) * slot_bytes(); }
  std::vector<std::int64_t> shape() const {
    return evicts ? std::vector<std::int64_t>{heads, 1, slots, width}
                  : std::vector<std::int64_t>{1, heads, slots, width};
  }
};

// Of a cache of `capacity` tokens; layer by layer: key, value and, where it evicts, state. No memory yet.
std::vector<Buffer> buffers_of(const Manifest& manifest, std::int64_t capacity);

class Buffers {
 public:
  // Memory for `capacity` tokens of one sequence (layers that evict: at most the budget), all of it allocated
  // here. `step`: tokens by which the layout grows towards it, which only memory of the host may; 0: it has
  // its full size from the start. Throws Failure: not enough memory.
  Buffers(const Manifest& manifest, std::int64_t capacity, Storage& storage, std::int64_t step);
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // What these would allocate. Throws Failure: more bytes than can be counted.
  static std::size_t bytes_for(const Manifest& manifest, std::int64_t capacity);

  // Make the layout have room for `tokens` tokens (<= capacity), keeping what is held: heads move apart,
  // within the same memory, from the last one on. New slots are empty. Every change of a shape raises
  // `generation`.
  void reserve(std::int64_t tokens);
  // Empty, and in the smallest layout: zeros, in keys and values the number `fill`, on which no result may
  // depend.
  void clear(float fill = 0.0F);

  std::vector<Buffer> all;    // as buffers_of gives them
  std::int64_t capacity;      // tokens of the sequence, at most
  std::int64_t laid_out = 0;  // tokens that the layout has room for now
  std::int64_t generation = 0;
  std::size_t bytes = 0;  // allocated
  Storage& storage;

 private:
  void blank(const Buffer& buffer, std::int64_t first, std::int64_t slots);

  std::int64_t step_;
  bool all_evict_;
  std::int64_t budget_;
  float fill_ = 0.0F;
  struct Release {
    Storage* storage;
    void operator()(void* address) const noexcept { storage->release(address); }
  };
  std::unique_ptr<void, Release> memory_;
};

// A number as so many bytes of `dtype`, and back.
std::uint32_t bits_of(float value, Dtype dtype);
float as_float(const void* bits, Dtype dtype);

}  // namespace kvexport::detail
