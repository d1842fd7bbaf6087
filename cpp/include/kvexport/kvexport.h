/* The C API of kvexport: runs a bundle without Python and PyTorch. kvexport.hpp builds the C++ API on it;
 * other languages call it directly.
 *
 * Errors. Every function that can fail returns NULL on success, or a kvexport_error that the caller frees
 * with kvexport_error_free. No exception passes through this header. Invalid arguments give KVEXPORT_USAGE
 * and leave sessions and caches unchanged. Pointer arguments must not be NULL unless stated otherwise.
 *
 * Threads. A session may be used by any number of threads. A cache may be used by one thread at a time;
 * different caches may be used by different threads at the same time. There is no global state; when the
 * library is loaded, it sets the environment variable ORT_DISABLE_TELEMETRY=1 unless the variable is set.
 *
 * Memory. A cache shares the data of its session, so both may be freed in any order. Returned arrays and
 * strings belong to the object that they came from; if a function is documented to return memory to be freed,
 * it names the function that frees it. Strings are UTF-8; lengths are in bytes.
 *
 * Structs that the caller fills start with their size, so that later versions can append members. Obtain them
 * from the _defaults functions, or set `size` to sizeof the struct. */
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

/* Codes of errors, equal to the exit codes of the command line:
 * KVEXPORT_GATE_FAILED       the self-test found that results differ from the reference outputs;
 * KVEXPORT_USAGE             an argument, an option or a file is invalid;
 * KVEXPORT_CANNOT_RUN_HERE   this machine lacks the memory, disk space, library or hardware that the call
 * needs. */
enum { KVEXPORT_GATE_FAILED = 1, KVEXPORT_USAGE = 2, KVEXPORT_CANNOT_RUN_HERE = 3 };

/* Parts of an error: the whole message (all other parts, one per line), what failed, the value that was
 * found, the values that are allowed, and how to fix it. A part that an error does not have is "". */
enum { KVEXPORT_MESSAGE = 0, KVEXPORT_FAILED = 1, KVEXPORT_GOT = 2, KVEXPORT_EXPECTED = 3, KVEXPORT_FIX = 4 };

/* Returns the code of an error; 0 for NULL. */
KVEXPORT_API int kvexport_error_code(const kvexport_error* error);
/* Returns a part of an error, valid until the error is freed; "" for NULL. */
KVEXPORT_API const char* kvexport_error_part(const kvexport_error* error, int part);
KVEXPORT_API void kvexport_error_free(kvexport_error* error);

/* Returns the version of the library, e.g. "0.1.0". */
KVEXPORT_API const char* kvexport_version(void);

/* Options of kvexport_open. */
typedef struct {
  size_t size;
  const char* provider; /* "cpu", "cuda" or "tensorrt"; "auto" [default]: a TensorRT engine of the bundle that
                           fits this machine, else CUDA, else the CPU */
  int32_t threads;      /* CPU threads per operator; 0 [default]: one per core */
  int32_t verify;       /* 1 [default]: hash the weights too; all other files are always hashed */
  int64_t chunk;        /* largest number of prompt tokens that are run at once [default: 128]; a cache holds
                           so many tokens besides the window in layers with a sliding window */
  const char* text_library; /* name or path of libonnxruntime-genai.so, which converts text [default:
                               "libonnxruntime-genai.so"]; "": token ids only */
} kvexport_open_options;
KVEXPORT_API kvexport_open_options kvexport_open_defaults(void);

/* Opens a bundle: verifies its files and loads the weights. `options` may be NULL. Fails with KVEXPORT_USAGE
 * if there is no bundle, it is damaged, or an option is out of range; with KVEXPORT_CANNOT_RUN_HERE if the
 * provider is not available or there is not enough memory. If only the text library is missing, the session
 * works with token ids, and kvexport_info::text_missing has the reason. */
KVEXPORT_API kvexport_error* kvexport_open(const char* bundle, const kvexport_open_options* options,
                                           kvexport_session** session);
/* Frees a session. Its caches stay usable. NULL is allowed. */
KVEXPORT_API void kvexport_close(kvexport_session* session);

/* Properties of an open session. */
typedef struct {
  const char* source;           /* name of the original model */
  const char* dtype;            /* "float32", "float16" or "bfloat16" */
  const char* provider;         /* "cpu", "cuda" or "tensorrt" */
  const char* engine;           /* library and version, e.g. "onnxruntime 1.28.0" */
  int64_t vocab_size;           /* number of token ids */
  int64_t capacity;             /* largest number of tokens of a cache */
  int64_t budget;               /* tokens that a layer with eviction keeps; 0: no layer evicts */
  int64_t bos_token_id;         /* -1: none */
  const int64_t* eos_token_ids; /* eos_token_count ids */
  size_t eos_token_count;
  int32_t has_text;         /* 1: text can be encoded and decoded */
  int32_t has_chat;         /* 1: the model has a chat template */
  const char* text_missing; /* why text is not available; "" if it is */
} kvexport_info;
/* Returns the properties, valid until the session is freed. */
KVEXPORT_API const kvexport_info* kvexport_session_info(const kvexport_session* session);

/* Memory in bytes. */
typedef struct {
  size_t size;
  size_t cache_bytes;               /* one cache of the requested capacity; of a layer with a sliding window,
                                       the window and one call: `chunk` tokens, or an engine's largest call */
  const char* device;               /* name of the GPU; "" on the CPU */
  size_t device_free, device_total; /* memory of the GPU; 0: unknown */
  size_t weights, activations;      /* on the GPU: weights, temporary values of a call; 0: unknown */
} kvexport_memory;
/* Fills `memory` for caches of `capacity` tokens; 0: the largest capacity. */
KVEXPORT_API kvexport_error* kvexport_session_memory(const kvexport_session* session, int64_t capacity,
                                                     kvexport_memory* memory);

/* Encodes text. `special`: 1 adds the tokenizer's special tokens, such as BOS. Free `ids` with
 * kvexport_ids_free. Fails with KVEXPORT_USAGE if the text is not UTF-8 or contains NUL; with
 * KVEXPORT_CANNOT_RUN_HERE if the session has no tokenizer. */
KVEXPORT_API kvexport_error* kvexport_encode(const kvexport_session* session, const char* text, size_t length,
                                             int special, int64_t** ids, size_t* count);
/* Decodes token ids; special tokens are omitted. Free `text` with kvexport_text_free; `length` may be NULL.
 */
KVEXPORT_API kvexport_error* kvexport_decode(const kvexport_session* session, const int64_t* ids,
                                             size_t count, char** text, size_t* length);
/* Encodes a user's message as the next turn of the cache's conversation: formatted by the model's chat
 * template, or the text itself if the model has none. `system`: a system prompt, allowed in the first turn
 * only; may be NULL. The cache is not changed. Free `ids` with kvexport_ids_free. */
KVEXPORT_API kvexport_error* kvexport_turn(const kvexport_cache* cache, const char* text, size_t text_length,
                                           const char* system, size_t system_length, int64_t** ids,
                                           size_t* count);
KVEXPORT_API void kvexport_ids_free(int64_t* ids);
KVEXPORT_API void kvexport_text_free(char* text);

/* Creates an empty cache for `capacity` tokens, prompt and answers together; 0: the largest capacity. All
 * memory of the cache is allocated here: for all tokens, but in layers with a sliding window only for the
 * window and the tokens of one call, and in layers that evict for the budget. */
KVEXPORT_API kvexport_error* kvexport_cache_new(kvexport_session* session, int64_t capacity,
                                                kvexport_cache** cache);
/* Creates a cache from a file that kvexport_cache_save, or Cache.save in Python, wrote for the same bundle.
 */
KVEXPORT_API kvexport_error* kvexport_cache_load(kvexport_session* session, const char* file,
                                                 int64_t capacity, kvexport_cache** cache);
/* Writes the cache to a file. The file appears only when it is complete. */
KVEXPORT_API kvexport_error* kvexport_cache_save(kvexport_cache* cache, const char* file);
/* Removes all tokens from the cache; its memory is kept. */
KVEXPORT_API kvexport_error* kvexport_cache_clear(kvexport_cache* cache);
/* Frees a cache. NULL is allowed. */
KVEXPORT_API void kvexport_cache_free(kvexport_cache* cache);
/* Returns the size of the cache's buffers in bytes; it never changes. */
KVEXPORT_API size_t kvexport_cache_bytes(const kvexport_cache* cache);
/* Returns the number of tokens that were run, without the last generated token, which the next call runs. */
KVEXPORT_API int64_t kvexport_cache_length(const kvexport_cache* cache);
/* Returns the largest number of tokens. */
KVEXPORT_API int64_t kvexport_cache_capacity(const kvexport_cache* cache);

/* Runs tokens after those in the cache, and returns the logits [vocab_size] after the last one; they are
 * valid until the cache's next call. Without tokens, the last token is run again. `logits` may be NULL. Fails
 * with KVEXPORT_USAGE if an id is not in the vocabulary, the tokens do not fit, or there are no tokens at
 * all. */
KVEXPORT_API kvexport_error* kvexport_prefill(kvexport_cache* cache, const int64_t* ids, size_t count,
                                              const float** logits);
/* Runs one token; otherwise as kvexport_prefill. */
KVEXPORT_API kvexport_error* kvexport_step(kvexport_cache* cache, int64_t token, const float** logits);

/* Options of kvexport_generate. */
typedef struct {
  size_t size;
  int64_t max_new_tokens;  /* [default: 128] */
  double temperature;      /* 0: greedy; below 0 [default]: 1 if top_k or top_p is set, else 0 */
  int64_t top_k;           /* sample from the K most likely tokens; 0 [default]: from all */
  double top_p;            /* sample from the most likely tokens that reach this probability [default: 1] */
  uint64_t seed;           /* random seed, used if `seeded` is 1; Python draws other tokens */
  int32_t seeded;          /* 0 [default]: a different seed for each call */
  int32_t own_stop_tokens; /* 1 [default]: stop at the model's EOS tokens, ignore stop_tokens */
  const int64_t* stop_tokens; /* stop_token_count ids */
  size_t stop_token_count;
  const char* const* stop_texts;   /* stop_text_count texts; the output ends before them */
  const size_t* stop_text_lengths; /* in bytes */
  size_t stop_text_count;
} kvexport_generate_options;
KVEXPORT_API kvexport_generate_options kvexport_generate_defaults(void);

/* Why a generation ended: a stop token or stop text, max_new_tokens, a full cache, or the callback. */
enum { KVEXPORT_STOP = 0, KVEXPORT_LENGTH = 1, KVEXPORT_CAPACITY = 2, KVEXPORT_CALLBACK = 3 };

/* Called with each new token and the text that it completes: whole characters, often none; length is 0 if the
 * session has no tokenizer. Text that could be the start of a stop text is held back; if some is left at the
 * end, the callback is called once more with token -1. Return 0 to continue. During the generation the cache
 * must not be freed, and other calls that use it fail. */
typedef int (*kvexport_on_token)(int64_t token, const char* text, size_t length, void* user);

/* Runs a prompt and generates tokens. The last token stays pending: the next call runs it first, so a
 * conversation is continued by passing the next turn only. `options`, `on_token` and `finish` may be NULL;
 * `user` is passed to `on_token`; `finish` receives one of the values above. */
KVEXPORT_API kvexport_error* kvexport_generate(kvexport_cache* cache, const int64_t* ids, size_t count,
                                               const kvexport_generate_options* options,
                                               kvexport_on_token on_token, void* user, int* finish);

/* Compares this machine's results with the reference outputs in the bundle. `report` receives JSON, to be
 * freed with kvexport_text_free. If the results differ, the error is KVEXPORT_GATE_FAILED and names the cause
 * (weights, engine, precision or cache); `report` is then set too. Damaged files are KVEXPORT_USAGE. Weights
 * that were not hashed by kvexport_open are hashed here. */
KVEXPORT_API kvexport_error* kvexport_self_test(const kvexport_session* session, char** report);

#ifdef __cplusplus
}
#endif
#endif
