#include "runtime/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <string>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {

// Number of most likely tokens that are sorted first for top_p; sorting a whole large vocabulary is slow.
constexpr std::size_t FIRST = 1024;

template <typename Number>
void require(bool valid, const char* name, Number got, const char* expected) {
  if (valid) return;
  std::ostringstream text;
  text << got;
  throw Failure(Code::usage, std::string(name) + " must be " + expected, text.str());
}

}  // namespace

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling) {
  require(sampling.temperature >= 0 && std::isfinite(sampling.temperature), "temperature",
          sampling.temperature, "0 or more");
  require(sampling.top_k >= 0, "top_k", sampling.top_k, "1 or more, or 0 for all");
  require(sampling.top_p > 0 && sampling.top_p <= 1, "top_p", sampling.top_p, "above 0 and at most 1");
  if (sampling.temperature == 0) return;
  if (sampling.seed) {
    random_.seed(*sampling.seed);
  } else {
    std::random_device device;
    random_.seed((static_cast<std::uint64_t>(device()) << 32U) ^ device());
  }
}

std::int64_t Sampler::choose(const float* logits, std::int64_t vocab_size) {
  std::int64_t likeliest = 0;
  bool finite = true;
  for (std::int64_t token = 0; token < vocab_size; ++token) {
    finite = finite && !std::isnan(logits[token]);
    if (logits[token] > logits[likeliest]) likeliest = token;
  }
  if (!finite || !std::isfinite(logits[likeliest])) {
    throw Failure(Code::usage, "the model's logits must be finite",
                  finite ? std::to_string(logits[likeliest]) : "nan", "",
                  "if the bundle's dtype is float16, build it with --dtype float32: a value of this model "
                  "overflows");
  }
  if (sampling_.temperature == 0) return likeliest;
  return sample(logits, static_cast<std::size_t>(vocab_size), logits[likeliest]);
}

std::int64_t Sampler::sample(const float* logits, std::size_t vocab_size, double largest) {
  weights_.resize(vocab_size);
  tokens_.resize(vocab_size);
  std::transform(logits, logits + vocab_size, weights_.begin(),
                 [&](float logit) { return std::exp((logit - largest) / sampling_.temperature); });
  std::iota(tokens_.begin(), tokens_.end(), 0);
  const auto likelier = [this](std::int64_t one, std::int64_t other) {
    const double left = weights_[static_cast<std::size_t>(one)],
                 right = weights_[static_cast<std::size_t>(other)];
    return left != right ? left > right : one < other;
  };
  const auto weight = [this](std::size_t at) { return weights_[static_cast<std::size_t>(tokens_[at])]; };
  std::size_t count = vocab_size;
  if (sampling_.top_k > 0) count = std::min(count, static_cast<std::size_t>(sampling_.top_k));
  const auto end = [&] { return tokens_.begin() + static_cast<std::ptrdiff_t>(count); };
  if (count < vocab_size) std::nth_element(tokens_.begin(), end(), tokens_.end(), likelier);
  double total = 0;
  for (std::size_t at = 0; at < count; ++at) total += weight(at);
  if (sampling_.top_p < 1) {
    const auto sorted = tokens_.begin() + static_cast<std::ptrdiff_t>(std::min(count, FIRST));
    std::partial_sort(tokens_.begin(), sorted, end(), likelier);
    double mass = 0;
    std::size_t size = 0;
    for (; size < count && mass < sampling_.top_p * total; ++size) {
      if (size == FIRST) std::sort(sorted, end(), likelier);
      mass += weight(size);
    }
    count = size, total = mass;
  }
  const double target = static_cast<double>(random_() >> 11U) * 0x1p-53 * total;
  double cumulative = 0;
  for (std::size_t at = 0; at < count; ++at) {
    cumulative += weight(at);
    if (target < cumulative) return tokens_[at];
  }
  return tokens_[count - 1];
}

}  // namespace kvexport::detail
