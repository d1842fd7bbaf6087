// Growth of buffers within their memory, and eviction, compared with simple implementations.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "check.hpp"
#include "runtime/buffers.hpp"
#include "runtime/eviction.hpp"
#include "runtime/host_storage.hpp"

using namespace kvexport::detail;

namespace {

Manifest manifest_of(Dtype dtype, std::optional<Eviction> eviction = {},
                     std::optional<std::int64_t> window = {}) {
  Manifest manifest;
  manifest.dtype = dtype;
  manifest.capacity = 1000;
  manifest.eviction = std::move(eviction);
  manifest.layers = {{3, 5, 7, window}, {1, 4, 4, window}};
  return manifest;
}

Eviction budget(std::int64_t slots, std::int64_t first, std::int64_t recent,
                std::vector<std::int64_t> skip = {}) {
  return {"l2-norm", slots, first, recent, std::move(skip)};
}

float* row(const Buffer& buffer, std::int64_t head, std::int64_t slot) {
  return static_cast<float*>(buffer.address) + (head * buffer.slots + slot) * buffer.width;
}

float mark(const Buffer& buffer, std::int64_t head, std::int64_t slot, std::int64_t at) {
  const std::int64_t of_buffer = 100000 * buffer.layer + 1000000 * static_cast<int>(buffer.which);
  return static_cast<float>(1 + at + 10 * slot + 10000 * head + of_buffer);
}

// The slots that remain, in the graph's order, by sorting all slots.
std::vector<std::size_t> kept_by_full_sort(const std::vector<float>& priorities, std::size_t keep) {
  std::vector<std::size_t> order(priorities.size());
  for (std::size_t at = 0; at < order.size(); ++at) order[at] = at;
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return priorities[a] > priorities[b]; });
  std::vector<bool> goes(order.size());
  for (std::size_t at = 0; at < order.size() - keep; ++at) goes[order[at]] = true;
  std::vector<std::size_t> kept;
  std::size_t next = keep;
  for (std::size_t slot = 0; slot < keep; ++slot) {
    if (!goes[slot]) {
      kept.push_back(slot);
      continue;
    }
    while (goes[next]) ++next;
    kept.push_back(next++);
  }
  return kept;
}

}  // namespace

TEST(growth_moves_heads_within_the_same_memory) {
  HostStorage storage;
  for (const std::vector<std::int64_t>& skip : {std::vector<std::int64_t>{}, {0}}) {
    const Manifest manifest = manifest_of(Dtype::float32, budget(300, 0, 1, skip));
    Buffers buffers(manifest, {700, 1}, storage, 256);
    CHECK_EQUAL(buffers.bytes, Buffers::bytes_for(manifest, {700, 1}));
    CHECK_EQUAL(buffers.layout_tokens, 256);
    std::vector<void*> addresses;
    for (const Buffer& buffer : buffers.all) {
      CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(buffer.address) % 256, 0U);
      CHECK_EQUAL(buffer.max_slots, buffer.evicts ? 300 : 700);
      addresses.push_back(buffer.address);
      for (std::int64_t head = 0; head < buffer.heads; ++head)
        for (std::int64_t slot = 0; slot < buffer.slots; ++slot)
          for (std::int64_t at = 0; at < buffer.width; ++at)
            row(buffer, head, slot)[at] = mark(buffer, head, slot, at);
    }
    std::int64_t generation = buffers.generation;
    for (const std::int64_t tokens : {256, 257, 300, 513, 700}) {
      buffers.reserve(tokens);
      CHECK(buffers.layout_tokens >= tokens);
      for (std::size_t index = 0; index < buffers.all.size(); ++index) {
        const Buffer& buffer = buffers.all[index];
        CHECK_EQUAL(buffer.address, addresses[index]);
        CHECK_EQUAL(buffer.slots, std::min(buffer.max_slots, buffers.layout_tokens));
        for (std::int64_t head = 0; head < buffer.heads; ++head)
          for (std::int64_t slot = 0; slot < buffer.slots; ++slot)
            for (std::int64_t at = 0; at < buffer.width; ++at)
              CHECK_EQUAL(row(buffer, head, slot)[at], slot < 256 ? mark(buffer, head, slot, at) : 0.0F);
      }
    }
    // If all layers evict, the layout stops growing at the budget.
    CHECK_EQUAL(buffers.generation - generation, skip.empty() ? 1 : 2);
    buffers.clear();
    CHECK_EQUAL(buffers.layout_tokens, 256);
    for (const Buffer& buffer : buffers.all) CHECK_EQUAL(row(buffer, 0, 0)[0], 0.0F);
  }
}

TEST(a_layout_without_growth_has_full_size) {
  HostStorage storage;
  Buffers buffers(manifest_of(Dtype::float16), {10, 1}, storage, 0);
  CHECK_EQUAL(buffers.layout_tokens, 10);
  CHECK_EQUAL(buffers.bytes,
              512U + 512 + 256 + 256);  // 300, 420, 80 and 80 bytes, aligned to 256
  const std::int64_t generation = buffers.generation;
  buffers.reserve(10);
  CHECK_EQUAL(buffers.generation, generation);
}

TEST(refuses_sizes_that_overflow) {
  Manifest manifest = manifest_of(Dtype::float32);
  CHECK_THROWS_WITH(Buffers::bytes_for(manifest, {std::numeric_limits<std::int64_t>::max(), 1}),
                    "not enough memory");
  manifest.layers[0].num_key_value_heads = std::int64_t{1} << 40;
  HostStorage storage;
  CHECK_THROWS_WITH(Buffers(manifest, {1 << 20, 1}, storage, 0), "not enough memory");
}

TEST(fills_keys_and_values_of_every_dtype) {
  HostStorage storage;
  for (const Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
    Buffers buffers(manifest_of(dtype, budget(20, 0, 1)), {600, 1}, storage, 256);
    buffers.clear(1000.0F);
    buffers.reserve(600);
    for (const Buffer& buffer : buffers.all) {
      for (std::size_t at = 0; at < buffer.bytes(); at += size_of(buffer.dtype)) {
        const float expected = buffer.which == Which::state ? 0.0F : 1000.0F;
        CHECK_EQUAL(as_float(static_cast<const char*>(buffer.address) + at, buffer.dtype), expected);
      }
    }
  }
}

TEST(converts_float16) {
  for (const float value : {1.0F, -2.0F, 0.0F, 1000.0F, 65504.0F, 0.333251953125F}) {
    const std::uint32_t bits = bits_of(value, Dtype::float16);
    CHECK_EQUAL(as_float(&bits, Dtype::float16), value);
  }
  const auto read = [](std::uint16_t bits) { return as_float(&bits, Dtype::float16); };
  CHECK_EQUAL(read(0x0001), std::ldexp(1.0F, -24));
  CHECK_EQUAL(read(0x03ff), std::ldexp(1023.0F, -24));
  CHECK_EQUAL(read(0xfc00), -std::numeric_limits<float>::infinity());
  CHECK(std::isnan(read(0x7e00)));
}

TEST(takes_slots_until_the_budget_is_full) {
  Occupancy occupancy;
  CHECK_EQUAL(occupancy.take(3, 5, 8), 0);
  CHECK_EQUAL(occupancy.take(1, 5, 8), 3);
  CHECK_EQUAL(occupancy.take(1, 5, 8), 4);
  CHECK_EQUAL(occupancy.take(1, 5, 8), 8);  // none is free: the graph evicts a token
  CHECK_EQUAL(occupancy.filled, 5);
  CHECK_EQUAL(occupancy.seen, 6);
}

TEST(evicts_the_tokens_that_a_full_sort_selects) {
  HostStorage storage;
  std::mt19937 random(7);
  const auto below = [&](std::int64_t end) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint32_t>(end));
  };
  for (int round = 0; round < 300; ++round) {
    const std::int64_t slots = 4 + below(40), first = below(3), recent = below(9), position = 100 + below(50);
    const bool windowed = below(2) == 0;
    const std::int64_t window = 3 + below(60);
    const Manifest manifest = manifest_of(Dtype::float32, budget(slots, first, recent),
                                          windowed ? std::optional<std::int64_t>(window) : std::nullopt);
    Buffers buffers(manifest, {200, 1}, storage, 256);
    buffers.reserve(200);
    Evictor evictor(manifest, buffers);
    const std::int64_t tokens = 2 + below(slots - 1), keep = below(tokens + 1);
    std::vector<std::vector<std::size_t>> expected;
    for (const Buffer& buffer : buffers.all) {
      for (std::int64_t head = 0; head < buffer.heads; ++head) {
        std::vector<float> priorities;
        for (std::int64_t slot = 0; slot < tokens; ++slot) {
          if (buffer.which != Which::state) {
            for (std::int64_t at = 0; at < buffer.width; ++at)
              row(buffer, head, slot)[at] = mark(buffer, head, slot, at);
            continue;
          }
          const auto position_plus_one = static_cast<float>(1 + below(position + 1));
          const float score = below(12) == 0 ? std::nanf("") : static_cast<float>(below(5));  // ties, and NaN
          row(buffer, head, slot)[0] = score, row(buffer, head, slot)[1] = position_plus_one;
          const auto following = static_cast<float>(position + 1);
          const auto spared = static_cast<float>(std::max<std::int64_t>(0, std::min(recent, keep - first)));
          float priority =
              position_plus_one <= following - spared && position_plus_one > static_cast<float>(first)
                  ? score
                  : -0x1p100F;
          if (windowed && position_plus_one <= following - static_cast<float>(window))
            priority = (0x1p24F - position_plus_one) * 0x1p60F;
          if (position_plus_one == following) priority = 0x1p100F;
          priorities.push_back(std::isnan(priority) ? -std::numeric_limits<float>::infinity() : priority);
        }
        if (buffer.which == Which::state)
          expected.push_back(kept_by_full_sort(priorities, static_cast<std::size_t>(keep)));
      }
    }
    std::vector<std::vector<float>> before;
    for (const Buffer& buffer : buffers.all) {
      const auto* values = static_cast<const float*>(buffer.address);
      before.emplace_back(values, values + buffer.bytes() / sizeof(float));
    }
    evictor.shrink(tokens, keep, position);
    std::size_t of_layer = 0;
    for (std::size_t index = 0; index < buffers.all.size(); ++index) {
      const Buffer& buffer = buffers.all[index];
      for (std::int64_t head = 0; head < buffer.heads; ++head) {
        const auto& kept = expected[of_layer + static_cast<std::size_t>(head)];
        for (std::int64_t slot = 0; slot < keep; ++slot) {
          const auto from = static_cast<std::int64_t>(kept[static_cast<std::size_t>(slot)]);
          const float* held = before[index].data() + (head * buffer.slots + from) * buffer.width;
          CHECK(std::memcmp(row(buffer, head, slot), held, buffer.slot_bytes()) == 0);
        }
        for (std::int64_t slot = keep; buffer.which == Which::state && slot < tokens; ++slot) {
          CHECK_EQUAL(row(buffer, head, slot)[0], 0.0F);
          CHECK_EQUAL(row(buffer, head, slot)[1], 0.0F);
        }
      }
      if (buffer.which == Which::state) of_layer += static_cast<std::size_t>(buffer.heads);
    }
  }
}
