// Stop texts and sampling, without a model.
#include <cmath>
#include <limits>
#include <set>

#include "bundle/error.hpp"
#include "check.hpp"
#include "runtime/generate.hpp"
#include "runtime/sampling.hpp"

using namespace kvexport::detail;

namespace {

using Texts = std::vector<std::string>;

// The output for each piece of text, and at the end.
Texts outputs_for(const Texts& stops, const Texts& pieces, bool* found = nullptr) {
  StopTexts until(stops);
  Texts all;
  for (const std::string& piece : pieces) all.push_back(until.add(piece));
  all.push_back(until.end());
  if (found != nullptr) *found = until.found();
  return all;
}

}  // namespace

TEST(text_passes_without_stop_texts) {
  CHECK(outputs_for({}, {"a", "", "bc"}) == (Texts{"a", "", "bc", ""}));
}

TEST(a_stop_text_ends_the_output) {
  bool found = false;
  CHECK(outputs_for({"END"}, {"one EN", "D two", "three"}, &found) == (Texts{"one ", "", "", ""}));
  CHECK(found);
  CHECK(outputs_for({"END"}, {"one EN", "ough"}, &found) == (Texts{"one ", "ENough", ""}));
  CHECK(!found);
  CHECK(outputs_for({"END"}, {"one E"}) ==
        (Texts{"one ", "E"}));  // text that was held back is output at the end
  CHECK(outputs_for({"b", "abc"}, {"xab"}) == (Texts{"xa", ""}));  // the one that occurs first
  CHECK(outputs_for({"aab"}, {"aa", "a", "b"}) ==
        (Texts{"", "a", "", ""}));  // a possible start within a possible start
  CHECK(outputs_for({"\n\n", "\nUser:"}, {"yes.\n", "User", ": no"}) == (Texts{"yes.", "", "", ""}));
  CHECK_THROWS_WITH(StopTexts({"a", ""}), "a stop text must not be empty");
  CHECK_THROWS_WITH(StopTexts({std::string("a\0b", 3)}), "NUL");
}

TEST(the_first_of_equal_largest_logits_is_chosen) {
  Sampler greedy{Sampling{}};
  const float logits[] = {1, 3, 2, 3};
  CHECK_EQUAL(greedy.choose(logits, 4), 1);
}

TEST(refuses_logits_that_are_not_finite) {
  for (const float wrong :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const double temperature : {0.0, 1.0}) {
      Sampling sampling;
      sampling.temperature = temperature;
      Sampler sampler(sampling);
      const float logits[] = {1, wrong, 2};
      CHECK_THROWS_WITH(sampler.choose(logits, 3), "must be finite");
    }
  }
  const float some[] = {-std::numeric_limits<float>::infinity(),
                        0};  // -infinity excludes a token and is no error
  CHECK_EQUAL(Sampler(Sampling{}).choose(some, 2), 1);
}

TEST(refuses_values_out_of_range) {
  const auto with = [](double temperature, std::int64_t top_k, double top_p) {
    return Sampler({temperature, top_k, top_p, {}});
  };
  CHECK_THROWS_WITH(with(-1, 0, 1), "temperature");
  CHECK_THROWS_WITH(with(std::nan(""), 0, 1), "temperature");
  CHECK_THROWS_WITH(with(1, -1, 1), "top_k must be 1 or more, or 0 for all\n  got:      -1");
  CHECK_THROWS_WITH(with(1, 0, 0), "top_p");
  CHECK_THROWS_WITH(with(1, 0, 1.5), "top_p");
}

TEST(samples_follow_the_probabilities) {
  const float logits[] = {std::log(0.1F), std::log(0.2F), std::log(0.3F), std::log(0.4F)};
  const auto counts = [&](std::int64_t top_k, double top_p) {
    Sampler sampler({1, top_k, top_p, 11});
    std::vector<double> counted(4);
    for (int draw = 0; draw < 20000; ++draw)
      counted[static_cast<std::size_t>(sampler.choose(logits, 4))] += 1.0 / 20000;
    return counted;
  };
  const auto close = [](const std::vector<double>& seen, const std::vector<double>& wanted) {
    for (std::size_t at = 0; at < 4; ++at) CHECK(std::fabs(seen[at] - wanted[at]) < 0.015);
  };
  close(counts(0, 1), {0.1, 0.2, 0.3, 0.4});
  close(counts(2, 1), {0, 0, 3.0 / 7, 4.0 / 7});
  close(counts(0, 0.65), {0, 0, 3.0 / 7, 4.0 / 7});
  close(counts(0, 0.75), {0, 2.0 / 9, 3.0 / 9, 4.0 / 9});
  close(counts(3, 0.8), {0, 2.0 / 9, 3.0 / 9, 4.0 / 9});
}

TEST(top_p_with_many_tokens) {
  std::vector<float> logits(5000);  // almost equal, so that most of them are needed
  for (std::size_t at = 0; at < logits.size(); ++at) logits[at] = -1e-5F * static_cast<float>(at);
  Sampler sampler({1, 0, 0.9, 3});
  std::int64_t largest = 0;
  for (int draw = 0; draw < 3000; ++draw) largest = std::max(largest, sampler.choose(logits.data(), 5000));
  CHECK(largest > 4300 && largest < 4501);
}
