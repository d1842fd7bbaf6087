// The record of an engine that was built for one device: engines/*/build.json of a bundle, as
// kvexport/bundle/engine_record.py writes it. The engine itself is loaded elsewhere.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bundle/bundle.hpp"

namespace kvexport::detail {

struct Profile {
  std::string name;
  std::int64_t minimum = 0, optimum = 0, maximum = 0;  // tokens in one call: minimum, optimum, maximum
};

struct BuildRecord {
  std::string directory, plan;  // absolute paths
  std::string target, engine;   // engine: "tensorrt" or "tensorrt-rtx"
  std::string version;          // version of the engine's library, e.g. "10.3.0.30"
  std::string kvexport, manifest_sha256, lowering, dtype;
  std::vector<std::string> compute_capability;  // e.g. "8.7"
  std::int64_t batch = 0, capacity = 0, chunk = 0;
  std::vector<Profile> profiles;  // the decode profile is the first
  std::string plan_sha256;
  std::uint64_t plan_bytes = 0, weights_bytes = 0;
  std::optional<std::uint64_t> activation_bytes;
  bool refit = false;  // the plan holds no weights; they are taken from the bundle
  bool version_compatible = false, hardware_compatible = false;

  void verify() const;  // Hashes the plan. Throws Failure if the hash differs from the record.
};

// Directories of the bundle's engines, sorted by name.
std::vector<std::string> engine_directories(const Bundle& bundle);

// Reads the record of an engine directory and checks the size of the plan; the plan is not hashed. Throws
// Failure if there is no engine, its format is not supported, the record is damaged, or the plan is missing
// or has a different size.
BuildRecord read_record(const std::string& directory);

// Parses the content of a record and checks nothing else.
BuildRecord parse_record(std::string_view text, const std::string& directory);

}  // namespace kvexport::detail
