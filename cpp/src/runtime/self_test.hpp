// A bundle held against its reference vectors where it runs: does it compute here what its PyTorch twin
// computed? Does what kvexport/runtime/self_test/verdict.py does, step by step, with the same verdicts and
// words; the algorithm is written there.
#pragma once

#include <memory>
#include <string>

#include "bundle/self_test_file.hpp"
#include "runtime/session.hpp"

namespace kvexport::detail {

struct SelfTestReport {
  bool ok = false;
  std::string verdict;    // "ok", "weights", "engine", "precision" or "cache"
  std::string json;       // as `kvexport self-test --json` prints it
  std::string said, fix;  // the verdict as a sentence; where it is not ok, what to do
};

// Of an opened bundle, in a cache of its own; hashes the weights where they were not when it was opened.
// Throws Failure: the bundle has no vectors, or its files are damaged; not enough memory; an engine that
// holds none of the vectors' rows.
SelfTestReport self_test(const std::shared_ptr<const Session>& session);

// From its second step on: the numbers alone.
SelfTestReport compare_outputs(const std::shared_ptr<const Session>& session,
                               const ReferenceOutputs& reference);

}  // namespace kvexport::detail
