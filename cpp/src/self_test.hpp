// Whether a bundle computes here what its PyTorch twin computed when it was built.
#pragma once

#include <memory>
#include <string>

#include "session.hpp"

namespace kvexport::detail {

struct SelfTestReport {
  bool ok = false;
  std::string json;       // as `kvexport self-test --json` prints it
  std::string said, fix;  // where it is not ok: what is at fault, and what to do
};

SelfTestReport self_test(const std::shared_ptr<const Session>& session);

}  // namespace kvexport::detail
