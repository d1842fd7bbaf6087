// A small test framework: TEST(name) { CHECK(...); }, and a main that runs all tests, or those named as
// arguments. Each test file is one program. A failed check ends its test only; a skipped test prints the
// reason.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace check {

struct Failed {
  std::string message;
};
struct Skipped {
  std::string reason;
};

struct Test {
  std::string name;
  std::function<void()> body;
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Registered {
  Registered(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& message) {
  throw Failed{std::string(file) + ":" + std::to_string(line) + ": " + message};
}

template <typename Left, typename Right>
void equal(const Left& left, const Right& right, const char* text, const char* file, int line) {
  if (left == right) return;
  std::ostringstream message;
  message << text << ": " << left << " is not " << right;
  fail(file, line, message.str());
}

template <typename Call>
void throws_with(Call call, const std::string& part, const char* text, const char* file, int line) {
  try {
    call();
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(part) == std::string::npos)
      fail(file, line, std::string(text) + " said\n" + error.what() + "\n and not: " + part);
    return;
  }
  fail(file, line, std::string(text) + " did not throw, and should have said: " + part);
}

// The path in an environment variable, set by the caller; without it the test is skipped.
inline std::string given(const char* variable) {
  const char* found = std::getenv(variable);
  if (found == nullptr || *found == '\0') throw Skipped{std::string(variable) + " is not set"};
  return found;
}

// A file or directory written by tests/cpp/reader_files.py.
inline std::string reader_file(const std::string& name) { return given("KVEXPORT_TEST_FILES") + "/" + name; }

// Exit code: 0 all passed, 1 some failed, 77 all skipped.
inline int run(int count, char** names) {
  std::size_t failed = 0, skipped = 0, ran = 0;
  for (const Test& test : tests()) {
    bool wanted = count < 2;
    for (int i = 1; i < count; ++i) wanted = wanted || test.name == names[i];
    if (!wanted) continue;
    ++ran;
    std::string message;
    try {
      test.body();
    } catch (const Skipped& reason) {
      ++skipped;
      std::printf("skipped %s: %s\n", test.name.c_str(), reason.reason.c_str());
    } catch (const Failed& failure) {
      message = failure.message;
    } catch (const std::exception& error) {
      message = std::string("threw ") + error.what();
    }
    if (!message.empty()) {
      ++failed;
      std::printf("FAILED %s: %s\n", test.name.c_str(), message.c_str());
    }
    std::fflush(stdout);
  }
  std::printf("%zu passed, %zu failed, %zu skipped\n", ran - failed - skipped, failed, skipped);
  if (failed != 0 || ran == 0) return 1;
  return skipped == ran ? 77 : 0;
}

}  // namespace check

#define TEST(name)                                               \
  static void name();                                            \
  static const check::Registered registered_##name(#name, name); \
  static void name()
#define CHECK(condition)                                           \
  do {                                                             \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
  } while (false)
#define CHECK_EQUAL(left, right) check::equal((left), (right), #left, __FILE__, __LINE__)
#define CHECK_THROWS_WITH(expression, part) \
  check::throws_with([&] { (void)(expression); }, (part), #expression, __FILE__, __LINE__)

int main(int count, char** names) { return check::run(count, names); }
