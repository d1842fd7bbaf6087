// The KV cache buffers of one sequence: one buffer for each cache input of the graph, in memory that is
// allocated once. Shapes and sizes only; slots are assigned by `Occupancy` and `Evictor` (eviction.hpp), and
// tokens are counted by `Cache` (cache.hpp).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bundle/manifest.hpp"
#include "runtime/storage.hpp"

namespace kvexport::detail {

enum class Which { key, value, state };

// Largest numbers of tokens that a cache has room for.
struct CacheSize {
  std::int64_t capacity;  // tokens of the sequence
  std::int64_t chunk;     // tokens of one call
};

// One buffer. Its shape is [1, heads, slots, width], or [heads, 1, slots, width] if its layer evicts; both
// have the same memory layout. Without eviction, the token at position p is in slot p modulo `slots`.
struct Buffer {
  std::string past, present;  // names of the graph's input and output that share the memory
  int layer;
  Which which;
  Dtype dtype;  // float32 for a state
  bool evicts;
  std::optional<std::int64_t> ring;  // the window of a ring (Manifest::ring_of)
  std::int64_t heads, width;
  std::int64_t max_slots;  // slots that memory is allocated for
  std::int64_t slots = 0;  // slots per head in the present layout
  void* address = nullptr;

  std::size_t slot_bytes() const { return static_cast<std::size_t>(width) * size_of(dtype); }
  std::size_t bytes() const { return static_cast<std::size_t>(heads * slots) * slot_bytes(); }
  std::vector<std::int64_t> shape() const {
    return evicts ? std::vector<std::int64_t>{heads, 1, slots, width}
                  : std::vector<std::int64_t>{1, heads, slots, width};
  }
};

// The buffers of a cache, without memory. Order: layer by layer; key, value and, if the layer evicts, state.
std::vector<Buffer> buffers_of(const Manifest& manifest, CacheSize size);

// Number of slots of a ring.
std::int64_t ring_slots(std::int64_t window, CacheSize size);

// A copy of consecutive slots within a head.
struct Move {
  std::int64_t target, source, slots;
  bool operator==(const Move& other) const {
    return target == other.target && source == other.source && slots == other.slots;
  }
};

// The copies that bring the last tokens of a sequence of `length` tokens from one ring to another: as many as
// both hold.
std::vector<Move> ring_moves(std::int64_t length, std::int64_t source_slots, std::int64_t target_slots);

class Buffers {
 public:
  // Allocates memory for `size.capacity` tokens of one sequence: at most the budget in layers that evict, and
  // the window and one call in rings. `step`: number of tokens by which the layout grows, which requires host
  // memory; 0: the layout has its full size from the start. Throws Failure if there is not enough memory.
  Buffers(const Manifest& manifest, CacheSize size, Storage& storage, std::int64_t step);
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // Bytes that the constructor would allocate. Throws Failure if the number overflows.
  static std::size_t bytes_for(const Manifest& manifest, CacheSize size);

  // The number of tokens, at most `count`, that one call may run from `position` on: it wraps in no ring, and
  // overwrites no token that it attends to.
  std::int64_t tokens_of_call(std::int64_t position, std::int64_t count) const;

  // Grows the layout to at least `tokens` tokens (<= capacity) and keeps the contents: the heads are moved
  // apart within the same memory, the last one first. New slots are empty. Every change of a shape increments
  // `generation`.
  void reserve(std::int64_t tokens);
  // Empties the buffers and returns to the smallest layout. Keys and values are set to `fill`, states to 0.
  // Results must not depend on `fill`.
  void clear(float fill = 0.0F);

  std::vector<Buffer> all;         // in the order of buffers_of
  std::int64_t capacity;           // largest number of tokens of the sequence
  std::int64_t layout_tokens = 0;  // tokens that the present layout has room for
  std::int64_t generation = 0;
  std::size_t bytes = 0;  // size of the allocation
  Storage& storage;

 private:
  void fill_empty(const Buffer& buffer, std::int64_t first, std::int64_t slots);

  std::int64_t step_;
  float fill_ = 0.0F;
  struct Release {
    Storage* storage;
    void operator()(void* address) const noexcept { storage->release(address); }
  };
  std::unique_ptr<void, Release> memory_;
};

// Conversion between float32 and the bits of `dtype`.
std::uint32_t bits_of(float value, Dtype dtype);
float as_float(const void* bits, Dtype dtype);

}  // namespace kvexport::detail
