// A control loop that talks: a fixed number of bytes for the conversation, and a deadline for each answer.
// Readings come as lines on standard input; whatever was said by the deadline is what there is.   robot
// BUNDLE KIB MILLISECONDS < READINGS
#include <kvexport/kvexport.hpp>

#include <charconv>
#include <chrono>
#include <iostream>
#include <string_view>

namespace {

// 0: it is no number, or none from 1 to 10^12.
std::int64_t number(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value > 0 && value <= 1'000'000'000'000
             ? value
             : 0;
}

// The longest conversation that fits, or 0.
std::int64_t capacity_within(const kvexport::Session& session, std::size_t budget) {
  std::int64_t fits = 0;
  for (std::int64_t more = session.info().capacity; more > 0;) {
    const std::int64_t tried = fits + more;
    if (tried <= session.info().capacity && session.memory(tried).cache_bytes <= budget)
      fits = tried;
    else
      more /= 2;
  }
  return fits;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::int64_t kib = argc == 4 ? number(argv[2]) : 0, patience = argc == 4 ? number(argv[3]) : 0;
  if (kib == 0 || patience == 0)
    return std::cerr << "usage: robot BUNDLE KIB MILLISECONDS < READINGS\n", KVEXPORT_USAGE;
  kvexport::Session session(argv[1]);
  session.self_test();  // throws where this board computes something else than was validated
  const std::int64_t capacity = capacity_within(session, static_cast<std::size_t>(kib) * 1024);
  if (capacity == 0) return std::cerr << "no conversation fits " << kib << " KiB\n", KVEXPORT_CANNOT_RUN_HERE;
  kvexport::Cache cache = session.new_cache(capacity);  // nothing is allocated for it after this line
  std::cerr << capacity << " tokens in " << cache.bytes() << " bytes\n";

  kvexport::GenerateOptions options;
  options.max_new_tokens = 32;
  for (std::string reading; std::getline(std::cin, reading);) try {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(patience);
      kvexport::Ids turn = cache.turn(reading);
      if (cache.length() + static_cast<std::int64_t>(turn.size()) + options.max_new_tokens > capacity) {
        cache.clear();  // a new conversation, in the same memory
        turn = cache.turn(reading);
      }
      const kvexport::Finish finish = cache.generate(turn, options, [&](std::int64_t, std::string_view text) {
        std::cout << text;
        return std::chrono::steady_clock::now() < deadline;
      });
      std::cout << (finish == kvexport::Finish::callback ? " [deadline]\n" : "\n") << std::flush;
    } catch (const kvexport::Error& error) {  // such as a reading that is too long: the loop goes on
      std::cerr << error.what() << '\n';
      cache.clear();
    }
  return 0;
} catch (const kvexport::Error& error) {
  return std::cerr << error.what() << '\n', error.code();
}
