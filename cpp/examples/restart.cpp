// Prefills a long prompt once: the first run saves its cache; later runs load it, also after a restart.
//   restart BUNDLE PROMPT_FILE CACHE_FILE QUESTION
#include <kvexport/kvexport.hpp>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

int main(int argc, char** argv) try {
  if (argc != 5)
    return std::cerr << "usage: restart BUNDLE PROMPT_FILE CACHE_FILE QUESTION\n", KVEXPORT_USAGE;
  kvexport::Session session(argv[1]);
  const bool saved = std::filesystem::exists(argv[3]);
  kvexport::Cache cache = saved ? session.load(argv[3]) : session.new_cache();
  if (!saved) {
    std::ifstream file(argv[2]);
    const std::string prompt{std::istreambuf_iterator<char>(file), {}};
    if (!file) return std::cerr << "cannot read " << argv[2] << '\n', KVEXPORT_USAGE;
    cache.prefill(session.encode(prompt));
    cache.save(argv[3]);
  }
  std::cerr << cache.length() << " tokens " << (saved ? "loaded" : "prefilled and saved") << '\n';
  cache.generate(session.encode(argv[4], false), {}, [](std::int64_t, std::string_view text) {
    std::cout << text << std::flush;
    return true;
  });
  std::cout << '\n';
  return 0;
} catch (const kvexport::Error& error) {
  return std::cerr << error.what() << '\n', error.code();
} catch (const std::exception& error) {  // e.g. of a file
  return std::cerr << error.what() << '\n', KVEXPORT_USAGE;
}
