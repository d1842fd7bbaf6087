#include "runtime/buffers.hpp"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {

constexpr std::size_t ALIGNMENT = 256;

std::size_t product(std::initializer_list<std::int64_t> factors) {
  std::size_t total = 1;
  for (std::int64_t factor : factors) {
    if (factor != 0 &&
        total > std::numeric_limits<std::size_t>::max() / 4 / static_cast<std::size_t>(factor)) {
      throw Failure(Code::cannot_run_here, "there is not enough memory for the KV cache",
                    "a size that overflows", "", "use a smaller cache capacity");
    }
    total *= static_cast<std::size_t>(factor);
  }
  return total;
}

std::size_t max_bytes(const Buffer& buffer) {
  const std::size_t bytes =
      product({buffer.heads, buffer.max_slots, static_cast<std::int64_t>(buffer.slot_bytes())});
  return bytes + (ALIGNMENT - bytes % ALIGNMENT) % ALIGNMENT;
}

std::size_t sum(const std::vector<Buffer>& all) {
  std::size_t bytes = 0;
  for (const Buffer& buffer : all) bytes += max_bytes(buffer);
  return bytes;
}

}  // namespace

std::vector<Buffer> buffers_of(const Manifest& manifest, CacheSize size) {
  std::vector<Buffer> all;
  for (std::size_t index = 0; index < manifest.layers.size(); ++index) {
    const Layer& layer = manifest.layers[index];
    const bool evicts = manifest.evicts(static_cast<std::int64_t>(index));
    const std::optional<std::int64_t> ring = manifest.ring_of(static_cast<std::int64_t>(index));
    std::int64_t max_slots = size.capacity;
    if (evicts) max_slots = std::min(manifest.eviction->budget, size.capacity);
    if (ring) max_slots = ring_slots(*ring, size);
    const auto add = [&](Which which, const char* name, std::int64_t width, Dtype dtype) {
      const std::string end = "." + std::to_string(index) + "." + name;
      all.push_back({"past_key_values" + end, "present" + end, static_cast<int>(index), which, dtype, evicts,
                     ring, layer.num_key_value_heads, width, max_slots});
    };
    add(Which::key, "key", layer.key_head_dim, manifest.dtype);
    add(Which::value, "value", layer.value_head_dim, manifest.dtype);
    if (evicts) add(Which::state, "state", 2, Dtype::float32);
  }
  return all;
}

std::int64_t ring_slots(std::int64_t window, CacheSize size) {
  return size.chunk < size.capacity - window ? window + size.chunk : size.capacity;  // cannot overflow
}

std::vector<Move> ring_moves(std::int64_t length, std::int64_t source_slots, std::int64_t target_slots) {
  std::vector<Move> moves;
  for (std::int64_t at = length - std::min({length, source_slots, target_slots}); at < length;) {
    const std::int64_t target = at % target_slots, source = at % source_slots,
                       slots = std::min({length - at, target_slots - target, source_slots - source});
    moves.push_back({target, source, slots});
    at += slots;
  }
  return moves;
}

Buffers::Buffers(const Manifest& manifest, CacheSize size, Storage& storage, std::int64_t step)
    : all(buffers_of(manifest, size)),
      capacity(size.capacity),
      bytes(sum(all)),
      storage(storage),
      step_(step == 0 ? size.capacity : step),
      memory_(storage.allocate(bytes), Release{&storage}) {
  assert(step == 0 || storage.is_host());
  std::size_t offset = 0;
  for (Buffer& buffer : all) {
    buffer.address = static_cast<char*>(memory_.get()) + offset;
    offset += max_bytes(buffer);
  }
  reserve(1);
}

std::size_t Buffers::bytes_for(const Manifest& manifest, CacheSize size) {
  return sum(buffers_of(manifest, size));
}

std::int64_t Buffers::tokens_of_call(std::int64_t position, std::int64_t count) const {
  for (const Buffer& buffer : all) {
    const std::int64_t slots = buffer.max_slots;
    if (!buffer.ring || slots == capacity) continue;  // a ring of `capacity` slots never wraps
    count = std::min(count, slots - position % slots);
    if (position >= slots) count = std::min(count, slots - *buffer.ring);
  }
  return count;
}

void Buffers::reserve(std::int64_t tokens) {
  assert(tokens <= capacity);
  if (tokens <= layout_tokens) return;
  const std::int64_t room = tokens > capacity - step_ ? capacity : (tokens + step_ - 1) / step_ * step_;
  for (Buffer& buffer : all) {
    const std::int64_t slots = std::min(room, buffer.max_slots), before = buffer.slots;
    if (slots == before) continue;
    const std::size_t slot = buffer.slot_bytes();
    if (before > 0) {
      for (std::int64_t head = buffer.heads - 1; head > 0; --head) {
        char* base = static_cast<char*>(buffer.address);
        std::memmove(base + static_cast<std::size_t>(head * slots) * slot,
                     base + static_cast<std::size_t>(head * before) * slot,
                     static_cast<std::size_t>(before) * slot);
      }
    }
    buffer.slots = slots;
    fill_empty(buffer, before, slots - before);
  }
  const bool full = std::all_of(all.begin(), all.end(),
                                [](const Buffer& buffer) { return buffer.slots == buffer.max_slots; });
  layout_tokens = full ? capacity : room;
  ++generation;
}

void Buffers::clear(float fill) {
  fill_ = fill;
  layout_tokens = 0;
  for (Buffer& buffer : all) buffer.slots = 0;
  reserve(1);
}

void Buffers::fill_empty(const Buffer& buffer, std::int64_t first, std::int64_t slots) {
  const std::size_t slot = buffer.slot_bytes(), bytes_of_head = static_cast<std::size_t>(slots) * slot;
  std::vector<char> pattern;
  if (fill_ != 0.0F && buffer.which != Which::state) {
    const std::uint32_t bits = bits_of(fill_, buffer.dtype);
    pattern.resize(bytes_of_head);
    for (std::size_t at = 0; at < pattern.size(); at += size_of(buffer.dtype)) {
      std::memcpy(pattern.data() + at, &bits,
                  size_of(buffer.dtype));  // little-endian, as every supported processor
    }
  }
  for (std::int64_t head = 0; head < buffer.heads; ++head) {
    char* start =
        static_cast<char*>(buffer.address) + static_cast<std::size_t>(head * buffer.slots + first) * slot;
    if (pattern.empty()) {
      storage.clear(start, bytes_of_head);
    } else {
      storage.upload(start, pattern.data(), bytes_of_head);
    }
  }
  storage.synchronize();  // the copies above read `pattern`
}

std::uint32_t bits_of(float value, Dtype dtype) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == Dtype::float32) return bits;
  if (dtype == Dtype::bfloat16) return bits >> 16U;
  if (value == 0.0F) return bits >> 16U;
  int exponent = 0;
  const float fraction = std::frexp(std::fabs(value), &exponent);
  assert(exponent > -14 && exponent <= 16 && "a normal number of float16");
  const auto mantissa = static_cast<std::uint32_t>(std::ldexp(fraction, 11)) & 0x3ffU;
  return ((bits >> 16U) & 0x8000U) | (static_cast<std::uint32_t>(exponent + 14) << 10U) | mantissa;
}

float as_float(const void* bits, Dtype dtype) {
  if (dtype == Dtype::float32) {
    float value = 0;
    std::memcpy(&value, bits, sizeof value);
    return value;
  }
  std::uint16_t half = 0;
  std::memcpy(&half, bits, sizeof half);
  if (dtype == Dtype::bfloat16) {
    const std::uint32_t wide = static_cast<std::uint32_t>(half) << 16U;
    float value = 0;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = (half >> 10U) & 0x1f;
  const auto mantissa = static_cast<float>(half & 0x3ffU);
  using Limits = std::numeric_limits<float>;
  float value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 0x1f) value = mantissa == 0 ? Limits::infinity() : Limits::quiet_NaN();
  return (half & 0x8000U) != 0 ? -value : value;
}

}  // namespace kvexport::detail
