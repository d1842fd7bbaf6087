/* A bundle is opened, run, saved, loaded, refused and closed, so many times, through the C ABI alone: what
 * valgrind watches. With "leak" the last session is not closed, which must be found.   leaks BUNDLE
 * CACHE_FILE TIMES [leak] */
#include <kvexport/kvexport.h>
#include <stdio.h>
#include <stdlib.h>

static void require(kvexport_error* error) {
  if (error == NULL) return;
  fprintf(stderr, "%s\n", kvexport_error_part(error, KVEXPORT_MESSAGE));
  exit(1);
}

static void require_refused(kvexport_error* error) {
  if (kvexport_error_code(error) != KVEXPORT_USAGE) exit(1);
  kvexport_error_free(error);
}

static int count(int64_t token, const char* text, size_t length, void* user) {
  (void)token, (void)text, (void)length;
  return ++*(int*)user == 4;
}

int main(int argc, char** argv) {
  const int64_t prompt[] = {1, 2, 3}, wrong[] = {-1};
  if (argc < 4) return KVEXPORT_USAGE;
  for (int times = atoi(argv[3]); times > 0; --times) {
    kvexport_open_options options = kvexport_open_defaults();
    kvexport_session* session = NULL;
    kvexport_cache *cache = NULL, *loaded = NULL;
    char* report = NULL;
    int tokens = 0, finish = 0;
    options.provider = "cpu", options.threads = 1, options.text_library = "";
    require(kvexport_open(argv[1], &options, &session));
    require(kvexport_cache_new(session, 0, &cache));
    require(kvexport_prefill(cache, prompt, 3, NULL));
    require(kvexport_step(cache, 4, NULL));
    require_refused(kvexport_prefill(cache, wrong, 1, NULL));
    require(kvexport_generate(cache, prompt, 1, NULL, count, &tokens, &finish));
    require(kvexport_cache_save(cache, argv[2]));
    require(kvexport_cache_load(session, argv[2], 0, &loaded));
    require(kvexport_step(loaded, 5, NULL));
    require_refused(kvexport_cache_load(session, argv[1], 0, &loaded));
    if (times % 10 == 1) require(kvexport_self_test(session, &report));
    kvexport_text_free(report);
    kvexport_cache_free(cache);
    if (times > 1 || argc == 4) kvexport_close(session); /* a cache outlives its session */
    kvexport_cache_free(loaded);
  }
  return 0;
}
