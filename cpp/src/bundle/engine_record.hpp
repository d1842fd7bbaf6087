// What was built for a device: engines/*/build.json of a bundle, as kvexport/bundle/engine_record.py writes
// it. Knows the record's keys and where an engine lies; neither loads an engine nor knows which device is
// here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bundle/bundle.hpp"

namespace kvexport::detail {

struct Profile {
  std::string name;
  std::int64_t least = 0, typical = 0, most = 0;  // tokens of a call
};

struct BuildRecord {
  std::string directory, plan;  // paths
  std::string target, engine;   // engine: "tensorrt" or "tensorrt-rtx"
  std::string version;          // of its library, such as "10.3.0.30"
  std::string kvexport, manifest_sha256, lowering, dtype;
  std::vector<std::string> compute_capability;  // such as "8.7"
  std::int64_t batch = 0, capacity = 0, chunk = 0;
  std::vector<Profile> profiles;  // decode first
  std::string plan_sha256;
  std::uint64_t plan_bytes = 0, weights_bytes = 0;
  std::optional<std::uint64_t> activation_bytes;
  bool refit = false;  // the plan has no weights, and takes the bundle's
  bool version_compatible = false, hardware_compatible = false;

  void verify() const;  // hash the plan. Throws Failure: not as it was built
};

// Folders of the bundle's engines, by name.
std::vector<std::string> engine_directories(const Bundle& bundle);

// The record in an engine's folder; the plan is there in its size (it is not hashed). Throws Failure: no
// engine, another format, a damaged record, a plan that is missing or of another size.
BuildRecord read_record(const std::string& directory);

// The record alone, from its bytes.
BuildRecord parse_record(std::string_view text, const std::string& directory);

}  // namespace kvexport::detail
