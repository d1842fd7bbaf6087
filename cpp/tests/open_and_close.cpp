// For valgrind: opens a bundle, generates and closes it, repeatedly. With `leak` the last cache is not freed,
// which valgrind must report.
//   open_and_close BUNDLE TIMES TEXT_LIBRARY [leak]
#include <kvexport/kvexport.h>

#include <cstdio>
#include <cstdlib>

namespace {

void require(kvexport_error* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s\n", kvexport_error_part(error, KVEXPORT_MESSAGE));
  std::exit(2);
}

}  // namespace

int main(int count, char** words) {
  if (count < 4) return 2;
  for (int left = std::atoi(words[2]); left > 0; --left) {
    kvexport_open_options options = kvexport_open_defaults();
    options.provider = "cpu", options.threads = 1, options.text_library = words[3];
    kvexport_session* session = nullptr;
    require(kvexport_open(words[1], &options, &session));
    kvexport_cache* cache = nullptr;
    require(kvexport_cache_new(session, 32, &cache));
    const int64_t ids[] = {1, 2, 3};
    kvexport_generate_options generate = kvexport_generate_defaults();
    generate.max_new_tokens = 2;
    int finish = 0;
    require(kvexport_generate(cache, ids, 3, &generate, nullptr, nullptr, &finish));
    kvexport_close(session);  // before the cache, which shares the session's data
    if (left > 1 || count < 5) kvexport_cache_free(cache);
    kvexport_error* refused = kvexport_open("/nowhere", &options, &session);
    if (refused == nullptr) return 2;
    kvexport_error_free(refused);
  }
  return 0;
}
