/* kvexport's C ABI: what kvexport.hpp is made of, and what other languages call. C++ users want kvexport.hpp,
 * which also says what each call does; here is what C must know beside that.
 *
 * Every function that can fail returns NULL, or an error that the caller frees; nothing is thrown through
 * this header. There is no global state. A cache keeps its session's weights alive, so sessions and caches
 * may be closed in any order. Strings are UTF-8. Arrays that are returned belong to the object they came
 * from, or where a `_free` is named, to the caller. Structs of the caller's begin with their size, so that
 * later versions may append to them: take them from the `_defaults` functions, or set `size` before they are
 * filled. */
#ifndef KVEXPORT_KVEXPORT_H
#define KVEXPORT_KVEXPORT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define KVEXPORT_API __attribute__((visibility("default")))
#else
#define KVEXPORT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvexport_error kvexport_error;
typedef struct kvexport_session kvexport_session;
typedef struct kvexport_cache kvexport_cache;

/* Of an error: as the exit codes of the command line. */
enum { KVEXPORT_GATE_FAILED = 1, KVEXPORT_USAGE = 2, KVEXPORT_CANNOT_RUN_HERE = 3 };
/* Parts of an error; a part that there is not is "". */
enum { KVEXPORT_MESSAGE = 0, KVEXPORT_FAILED = 1, KVEXPORT_GOT = 2, KVEXPORT_EXPECTED = 3, KVEXPORT_FIX = 4 };
KVEXPORT_API int kvexport_error_code(const kvexport_error* error);
KVEXPORT_API const char* kvexport_error_part(const kvexport_error* error, int part);
KVEXPORT_API void kvexport_error_free(kvexport_error* error);

KVEXPORT_API const char* kvexport_version(void);

typedef struct {
  size_t size;
  const char* provider;     /* "auto", "cpu", "cuda" or "tensorrt" */
  int32_t threads;          /* of one operator on the CPU; 0: one a core */
  int32_t verify;           /* hash the weights too */
  int64_t chunk;            /* the most tokens of a prompt in one call */
  const char* text_library; /* libonnxruntime-genai.so, by name or path; "": token ids only */
} kvexport_open_options;
KVEXPORT_API kvexport_open_options kvexport_open_defaults(void);
KVEXPORT_API kvexport_error* kvexport_open(const char* bundle, const kvexport_open_options* options,
                                           kvexport_session** session);
KVEXPORT_API void kvexport_close(kvexport_session* session);

/* Of an open session, as long as it lives. */
typedef struct {
  const char *source, *dtype, *provider, *engine; /* engine: the library and its version */
  int64_t vocab_size, capacity, budget; /* budget: tokens that layers hold which evict; 0: none does */
  int64_t bos_token_id;                 /* -1: none */
  const int64_t* eos_token_ids;
  size_t eos_token_count;
  int32_t has_text, has_chat;
  const char* text_missing; /* why there is no text, where there is none */
} kvexport_info;
KVEXPORT_API const kvexport_info* kvexport_session_info(const kvexport_session* session);

typedef struct {
  size_t size;
  size_t cache_bytes;                                     /* of one cache of the given capacity */
  const char* device;                                     /* "" on the CPU */
  size_t device_free, device_total, weights, activations; /* 0: not told */
} kvexport_memory;
KVEXPORT_API kvexport_error* kvexport_session_memory(const kvexport_session* session, int64_t capacity,
                                                     kvexport_memory* memory);

/* Text. Lengths are in bytes; ids and text are freed by the caller. */
KVEXPORT_API kvexport_error* kvexport_encode(const kvexport_session* session, const char* text, size_t length,
                                             int special, int64_t** ids, size_t* count);
KVEXPORT_API kvexport_error* kvexport_decode(const kvexport_session* session, const int64_t* ids,
                                             size_t count, char** text, size_t* length);
/* `system` may be NULL. */
KVEXPORT_API kvexport_error* kvexport_turn(const kvexport_cache* cache, const char* text, size_t text_length,
                                           const char* system, size_t system_length, int64_t** ids,
                                           size_t* count);
KVEXPORT_API void kvexport_ids_free(int64_t* ids);
KVEXPORT_API void kvexport_text_free(char* text);

/* `capacity` 0: the bundle's, or its engine's. */
KVEXPORT_API kvexport_error* kvexport_cache_new(kvexport_session* session, int64_t capacity,
                                                kvexport_cache** cache);
KVEXPORT_API kvexport_error* kvexport_cache_load(kvexport_session* session, const char* file,
                                                 int64_t capacity, kvexport_cache** cache);
KVEXPORT_API kvexport_error* kvexport_cache_save(kvexport_cache* cache, const char* file);
KVEXPORT_API kvexport_error* kvexport_cache_clear(kvexport_cache* cache);
KVEXPORT_API void kvexport_cache_free(kvexport_cache* cache);
KVEXPORT_API size_t kvexport_cache_bytes(const kvexport_cache* cache);
KVEXPORT_API int64_t kvexport_cache_length(const kvexport_cache* cache);
KVEXPORT_API int64_t kvexport_cache_capacity(const kvexport_cache* cache);

/* Logits [vocab_size] after the last token; the cache's, until its next call. `logits` may be NULL. */
KVEXPORT_API kvexport_error* kvexport_prefill(kvexport_cache* cache, const int64_t* ids, size_t count,
                                              const float** logits);
KVEXPORT_API kvexport_error* kvexport_step(kvexport_cache* cache, int64_t token, const float** logits);

typedef struct {
  size_t size;
  int64_t max_new_tokens;
  double temperature; /* 0: the likeliest token; below 0: 1 where top_k or top_p is given, else 0 */
  int64_t top_k;      /* 0: all */
  double top_p;       /* 1: all */
  uint64_t seed;      /* of draws, where `seeded` */
  int32_t seeded;
  int32_t own_stop_tokens; /* 1: the model's own, in place of those that follow */
  const int64_t* stop_tokens;
  size_t stop_token_count;
  const char* const* stop_texts;
  const size_t* stop_text_lengths;
  size_t stop_text_count;
} kvexport_generate_options;
KVEXPORT_API kvexport_generate_options kvexport_generate_defaults(void);
enum { KVEXPORT_STOP = 0, KVEXPORT_LENGTH = 1, KVEXPORT_CAPACITY = 2, KVEXPORT_CALLBACK = 3 };
/* Whole characters that `token` completes, often none; at the end once more with token -1, if anything was
 * held back. Without text, length is 0. Anything but 0 ends the generation; until then calls that use the
 * cache are refused, and it must not be freed. */
typedef int (*kvexport_on_token)(int64_t token, const char* text, size_t length, void* user);
KVEXPORT_API kvexport_error* kvexport_generate(kvexport_cache* cache, const int64_t* ids, size_t count,
                                               const kvexport_generate_options* options,
                                               kvexport_on_token on_token, void* user, int* finish);

/* `report`: JSON, freed with kvexport_text_free. Of a bundle that does not compute what was validated the
 * code is KVEXPORT_GATE_FAILED, and the report is there too. */
KVEXPORT_API kvexport_error* kvexport_self_test(const kvexport_session* session, char** report);

#ifdef __cplusplus
}
#endif
#endif
