// A chat in a terminal: one conversation, in memory allocated at the start. Usage: chat BUNDLE [SYSTEM]
#include <kvexport/kvexport.hpp>

#include <iostream>
#include <string>

int main(int argc, char** argv) try {
  if (argc < 2) return std::cerr << "usage: chat BUNDLE [SYSTEM]\n", KVEXPORT_USAGE;
  kvexport::Session session(argv[1]);
  kvexport::Cache cache = session.new_cache();
  const std::string system = argc > 2 ? argv[2] : "";
  std::cerr << session.info().engine << ": " << cache.capacity() << " tokens in " << cache.bytes() / 1024
            << " KiB\n";
  for (std::string line; std::cerr << "> ", std::getline(std::cin, line);) {
    kvexport::Ids turn = cache.turn(line, cache.length() == 0 ? system : "");
    if (cache.length() + static_cast<std::int64_t>(turn.size()) >= cache.capacity()) {
      std::cerr << "(the cache is full: a new conversation begins)\n";
      cache.clear();
      turn = cache.turn(line, system);
    }
    cache.generate(turn, {}, [](std::int64_t, std::string_view text) {
      std::cout << text << std::flush;
      return true;
    });
    std::cout << '\n';
  }
  return 0;
} catch (const kvexport::Error& error) {
  return std::cerr << error.what() << '\n', error.code();
}
