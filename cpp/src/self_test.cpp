#include "self_test.hpp"

#include "error.hpp"

namespace kvexport::detail {

SelfTestReport self_test(const std::shared_ptr<const Session>&) {
  throw Failure(Code::cannot_run_here, "this version has no self-test in C++ yet", "", "", "kvexport self-test BUNDLE");
}

}  // namespace kvexport::detail
