// The self-test: compares this machine's results with the bundle's reference outputs. Same steps, verdicts
// and messages as kvexport/runtime/self_test/verdict.py, where the algorithm is described.
#pragma once

#include <memory>
#include <string>

#include "bundle/self_test_file.hpp"
#include "runtime/session.hpp"

namespace kvexport::detail {

struct SelfTestReport {
  bool ok = false;
  std::string verdict;       // "ok", "weights", "engine", "precision" or "cache"
  std::string json;          // as `kvexport self-test --json` prints it
  std::string message, fix;  // the verdict as a sentence; how to fix it, "" if the verdict is ok
};

// Tests an open bundle, in a cache of its own. Hashes the weights if they were not hashed when the bundle was
// opened. Throws Failure if the bundle has no reference outputs or damaged files, there is not enough memory,
// or the engine's capacity is too small for the test.
SelfTestReport self_test(const std::shared_ptr<const Session>& session);

// The second step of the self-test: compares numbers only, no hashes.
SelfTestReport compare_outputs(const std::shared_ptr<const Session>& session,
                               const ReferenceOutputs& reference);

}  // namespace kvexport::detail
