// The exception type of the library: what failed, what was got, what was expected, and how to fix it, as
// kvexport/errors.py. The C API converts it to a kvexport_error.
#pragma once

#include <exception>
#include <string>
#include <utility>

namespace kvexport::detail {

// Equal to the exit codes of the command line.
enum class Code { gate_failed = 1, usage = 2, cannot_run_here = 3 };

class Failure : public std::exception {
 public:
  Failure(Code code, std::string failed, std::string got = {}, std::string expected = {},
          std::string fix = {})
      : code(code),
        failed(std::move(failed)),
        got(std::move(got)),
        expected(std::move(expected)),
        fix(std::move(fix)) {
    message_ = this->failed;
    if (!this->got.empty()) message_ += "\n  got:      " + this->got;
    if (!this->expected.empty()) message_ += "\n  expected: " + this->expected;
    if (!this->fix.empty()) message_ += "\n  fix:      " + this->fix;
  }

  // The whole message: each part on its own line.
  const char* what() const noexcept override { return message_.c_str(); }

  Code code;
  std::string failed, got, expected, fix;

 private:
  std::string message_;
};

// The bundle is damaged, incomplete, or of an unsupported format version.
inline Failure bundle_error(std::string failed, std::string got = {}, std::string expected = {},
                            std::string fix = {}) {
  if (fix.empty()) fix = "copy the bundle again, or build it again: kvexport build CHECKPOINT -o BUNDLE";
  return {Code::usage, std::move(failed), std::move(got), std::move(expected), std::move(fix)};
}

}  // namespace kvexport::detail
