// The one kind of exception inside the library: what failed, the value it got, the values it expected, and
// how to fix it. The C ABI turns it into a kvexport_error; nothing else is thrown on purpose.
#pragma once

#include <exception>
#include <string>
#include <utility>

namespace kvexport::detail {

// As the exit codes of the command line.
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

  // All parts, one a line.
  const char* what() const noexcept override { return message_.c_str(); }

  Code code;
  std::string failed, got, expected, fix;

 private:
  std::string message_;
};

// The bundle is damaged, incomplete, or of a format that this version does not read.
inline Failure bundle_error(std::string failed, std::string got = {}, std::string expected = {},
                            std::string fix = {}) {
  if (fix.empty()) fix = "copy the bundle again, or build it again: kvexport build CHECKPOINT -o BUNDLE";
  return {Code::usage, std::move(failed), std::move(got), std::move(expected), std::move(fix)};
}

}  // namespace kvexport::detail
