#include "engines/engine_choice.hpp"

#include <algorithm>
#include <sstream>
#include <vector>

#include "bundle/error.hpp"
#include "engines/engine.hpp"

namespace kvexport::detail {

namespace {

std::vector<long> numbers(const std::string& version) {
  std::vector<long> parts;
  std::istringstream text(version);
  for (std::string part; std::getline(text, part, '.') && !part.empty() && part.size() < 9;) {
    if (part.find_first_not_of("0123456789") != std::string::npos) break;
    parts.push_back(std::stol(part));
  }
  return parts;
}

// Compares the parts that both have, at least three: the library reports three, a record may have four.
bool same_version(const std::string& built, const std::string& here) {
  const std::vector<long> left = numbers(built), right = numbers(here);
  const std::size_t common = std::min(left.size(), right.size());
  return common >= 3 &&
         std::equal(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(common), right.begin());
}

std::string joined(const std::vector<std::string>& parts, const char* between) {
  std::string whole;
  for (const std::string& part : parts) whole += (whole.empty() ? "" : between) + part;
  return whole;
}

// Why the plan cannot run on this machine; "" if it can.
std::string reason_not_to_run(const BuildRecord& record, const std::string& gpu,
                              const std::string& capability, const EngineLibrary& library) {
  const std::vector<std::string>& built = record.compute_capability;
  // A hardware-compatible plan runs on Ampere and later.
  const bool later = record.hardware_compatible && numbers(capability) >= std::vector<long>{8, 0};
  if (std::find(built.begin(), built.end(), capability) == built.end() && !later)
    return "was built for compute capability " + joined(built, " or ") + ", and " + gpu + " has " +
           capability;
  if (record.batch != 1)
    return "was built for " + std::to_string(record.batch) + " sequences at a time, and the runtime runs one";
  if (record.engine != library.name)
    return "needs " + record.engine + " " + record.version + "; this libkvexport was built with " +
           library.name;
  // A later version runs only version-compatible plans, and those contain host code, which is refused below.
  if (!same_version(record.version, library.version))
    return "was built with " + record.engine + " " + record.version + ", here is " + library.version;
  if (record.version_compatible)
    return "contains host code (--version-compatible), which the C++ library does not run";
  if (record.refit)
    return "was built without weights (--refit), which requires TensorRT's parser: build it without --refit";
  return "";
}

}  // namespace

bool has_engine(const Bundle& bundle) { return !engine_directories(bundle).empty(); }

BuildRecord choose_engine(const Bundle& bundle, const std::string& gpu, const std::string& compute_capability,
                          const EngineLibrary& library) {
  std::vector<std::string> reasons;
  for (const std::string& directory : engine_directories(bundle)) {
    BuildRecord record = read_record(directory);
    const std::string reason = reason_not_to_run(record, gpu, compute_capability, library);
    if (!reason.empty()) {
      reasons.push_back(record.target + " " + reason);
      continue;
    }
    if (record.manifest_sha256 != bundle.manifest.digest)
      throw bundle_error("the engine " + directory + " must be built from this bundle", "", "",
                         "build it again: kvexport engine BUNDLE --target " + record.target + " --force");
    return record;
  }
  throw Failure(Code::cannot_run_here,
                "the bundle " + bundle.path + " must have an engine that this machine can run",
                reasons.empty() ? "no engine" : joined(reasons, "; "), "",
                "build one here: kvexport engine " + bundle.path);
}

}  // namespace kvexport::detail
