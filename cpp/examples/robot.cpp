// A control loop that talks: a fixed number of bytes for the conversation, and a deadline for each answer. Readings come as
// lines on standard input; whatever was said by the deadline is what there is.   robot BUNDLE KIB MILLISECONDS
#include <kvexport/kvexport.hpp>

#include <chrono>
#include <iostream>
#include <string>

int main(int argc, char** argv) try {
  if (argc != 4) return std::cerr << "usage: robot BUNDLE KIB MILLISECONDS < READINGS\n", KVEXPORT_USAGE;
  const std::size_t budget = std::stoul(argv[2]) * 1024;
  const std::chrono::milliseconds patience(std::stol(argv[3]));
  kvexport::Session session(argv[1]);
  if (session.self_test().empty()) return KVEXPORT_GATE_FAILED;  // throws where this board computes something else

  std::int64_t capacity = session.info().capacity;  // the longest conversation that fits
  while (capacity > 1 && session.memory(capacity).cache_bytes > budget) capacity -= (capacity + 7) / 8;
  kvexport::Cache cache = session.new_cache(capacity);  // nothing is allocated for it after this line
  std::cerr << capacity << " tokens in " << cache.bytes() << " of " << budget << " bytes\n";

  kvexport::GenerateOptions options;
  options.max_new_tokens = 32;
  for (std::string reading; std::getline(std::cin, reading);) {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    kvexport::Ids turn = cache.turn(reading);
    const auto needed = static_cast<std::int64_t>(turn.size()) + options.max_new_tokens;
    if (cache.length() + needed > cache.capacity()) {  // a new conversation, in the same memory
      cache.clear();
      turn = cache.turn(reading);
    }
    const kvexport::Finish finish = cache.generate(turn, options, [&](std::int64_t, std::string_view text) {
      std::cout << text;
      return std::chrono::steady_clock::now() < deadline;
    });
    std::cout << (finish == kvexport::Finish::callback ? " [deadline]\n" : "\n") << std::flush;
  }
  return 0;
} catch (const kvexport::Error& error) {
  return std::cerr << error.what() << '\n', error.code();
}
