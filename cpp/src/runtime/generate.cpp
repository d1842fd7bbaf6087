#include "runtime/generate.hpp"

#include <algorithm>

#include "bundle/error.hpp"

namespace kvexport::detail {

StopTexts::StopTexts(const std::vector<std::string>& texts) : texts_(texts) {
  if (std::find(texts.begin(), texts.end(), std::string()) != texts.end()) {
    throw Failure(Code::usage, "a stop text must not be empty", "", "", "leave it out");
  }
  for (const std::string& each : texts) {
    if (each.find('\0') == std::string::npos) continue;
    throw Failure(Code::usage, "a stop text must not contain a NUL character", "", "", "remove it");
  }
}

std::string StopTexts::add(const std::string& piece) {
  if (found_) return {};
  std::string text = waiting_ + piece;
  std::size_t output_end = std::string::npos;
  for (const std::string& each : texts_) output_end = std::min(output_end, text.find(each));
  found_ = output_end != std::string::npos;
  if (!found_) output_end = text.size() - possible_start(text);
  waiting_ = text.substr(output_end);
  text.resize(output_end);
  return text;
}

// Number of bytes at the end of the text that could be the start of a stop text.
std::size_t StopTexts::possible_start(const std::string& text) const {
  std::size_t longest = 0;
  for (const std::string& each : texts_) {
    for (std::size_t bytes = std::min(text.size(), each.size() - 1); bytes > longest; --bytes) {
      if (text.compare(text.size() - bytes, bytes, each, 0, bytes) == 0) longest = bytes;
    }
  }
  return longest;
}

namespace {

// Text of the generated tokens; empty if the session has no tokenizer.
class TextOutput {
 public:
  TextOutput(const Cache& cache, const std::int64_t* ids, std::size_t count,
             const std::vector<std::string>& stop_texts)
      : stop_texts_(stop_texts) {
    const Text* text = stop_texts.empty() ? cache.session().text.get() : &cache.session().require_text();
    if (text == nullptr) return;
    std::vector<std::int64_t> before = cache.last();
    before.insert(before.end(), ids, ids + count);
    stream_.emplace(*text, before);
  }

  std::string add(std::int64_t token) {
    return stream_ ? stop_texts_.add(stream_->add(token)) : std::string();
  }
  std::string end() {
    if (!stream_) return {};
    std::string text = stop_texts_.add(stream_->end());
    return text + stop_texts_.end();
  }
  bool stopped() const { return stop_texts_.found(); }

 private:
  std::optional<TextStream> stream_;
  StopTexts stop_texts_;
};

}  // namespace

Finish generate(Cache& cache, const std::int64_t* ids, std::size_t count, const GenerateOptions& options,
                const OnToken& on_token) {
  if (options.max_new_tokens < 1) {
    throw Failure(Code::usage, "max_new_tokens must be at least 1", std::to_string(options.max_new_tokens));
  }
  const Manifest& manifest = cache.session().manifest();
  const std::vector<std::int64_t>& stops =
      options.stop_tokens ? *options.stop_tokens : manifest.eos_token_ids;
  Sampler sampler(options.sampling);
  cache.require_prefill(ids, count);
  TextOutput output(cache, ids, count, options.stop_texts);
  const Cache::Lease lease(cache);
  const auto emit = [&](std::int64_t token, const std::string& text) {
    return !on_token || on_token(token, text);
  };
  const auto finish_with = [&](Finish finish) {
    const std::string rest = output.end();
    if (!rest.empty()) emit(-1, rest);
    return finish;
  };

  const float* logits = cache.prefill(ids, count);
  for (std::int64_t generated = 1;; ++generated) {
    const std::int64_t token = sampler.choose(logits, manifest.vocab_size);
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) return finish_with(Finish::stop);
    cache.choose(token);
    if (!emit(token, output.add(token))) return Finish::callback;
    if (output.stopped()) return Finish::stop;
    if (generated == options.max_new_tokens) return finish_with(Finish::length);
    if (cache.length() == cache.capacity()) return finish_with(Finish::capacity);
    logits = cache.run_pending();
  }
}

}  // namespace kvexport::detail
