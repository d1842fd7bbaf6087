#include "runtime/generate.hpp"

#include <algorithm>

#include "bundle/error.hpp"

namespace kvexport::detail {

StopTexts::StopTexts(const std::vector<std::string>& texts) : texts_(texts) {
  if (std::find(texts.begin(), texts.end(), std::string()) != texts.end()) {
    throw Failure(Code::usage, "a text to stop at is empty", "", "", "leave it out");
  }
  for (const std::string& each : texts) {
    if (each.find('\0') == std::string::npos) continue;
    throw Failure(Code::usage, "a text to stop at has a NUL character in it", "", "", "leave it out");
  }
}

std::string StopTexts::add(const std::string& piece) {
  if (found_) return {};
  std::string text = waiting_ + piece;
  std::size_t certain = std::string::npos;
  for (const std::string& each : texts_) certain = std::min(certain, text.find(each));
  found_ = certain != std::string::npos;
  if (!found_) certain = text.size() - begun(text);
  waiting_ = text.substr(certain);
  text.resize(certain);
  return text;
}

// Number of bytes at the end of the text that could be the start of a stop text.
std::size_t StopTexts::begun(const std::string& text) const {
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
      : until_(stop_texts) {
    const Text* text = stop_texts.empty() ? cache.session().text.get() : &cache.session().require_text();
    if (text == nullptr) return;
    std::vector<std::int64_t> before = cache.last();
    before.insert(before.end(), ids, ids + count);
    stream_.emplace(*text, before);
  }

  std::string add(std::int64_t token) { return stream_ ? until_.add(stream_->add(token)) : std::string(); }
  std::string end() {
    if (!stream_) return {};
    std::string said = until_.add(stream_->end());
    return said + until_.end();
  }
  bool stopped() const { return until_.found(); }

 private:
  std::optional<TextStream> stream_;
  StopTexts until_;
};

}  // namespace

Finish generate(Cache& cache, const std::int64_t* ids, std::size_t count, const GenerateOptions& options,
                const OnToken& on_token) {
  if (options.max_new_tokens < 1) {
    throw Failure(Code::usage, "max_new_tokens is out of range", std::to_string(options.max_new_tokens),
                  "1 or more");
  }
  const Manifest& manifest = cache.session().manifest();
  const std::vector<std::int64_t>& stops =
      options.stop_tokens ? *options.stop_tokens : manifest.eos_token_ids;
  Sampler sampler(options.sampling);
  cache.require_prefill(ids, count);
  TextOutput said(cache, ids, count, options.stop_texts);
  const Cache::Lease lease(cache);
  const auto tell = [&](std::int64_t token, const std::string& text) {
    return !on_token || on_token(token, text);
  };
  const auto ended = [&](Finish finish) {
    const std::string rest = said.end();
    if (!rest.empty()) tell(-1, rest);
    return finish;
  };

  const float* logits = cache.prefill(ids, count);
  for (std::int64_t made = 1;; ++made) {
    const std::int64_t token = sampler.choose(logits, manifest.vocab_size);
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) return ended(Finish::stop);
    cache.choose(token);
    if (!tell(token, said.add(token))) return Finish::callback;
    if (said.stopped()) return Finish::stop;
    if (made == options.max_new_tokens) return ended(Finish::length);
    if (cache.length() == cache.capacity()) return ended(Finish::capacity);
    logits = cache.feed_pending();
  }
}

}  // namespace kvexport::detail
