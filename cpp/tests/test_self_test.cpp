// The self-test on bundles written by tests/cpp/test_cpp_self_test.py: correct engines pass, and each kind of
// fault gets its verdict.
#include "runtime/self_test.hpp"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "bundle/error.hpp"
#include "bundle/file.hpp"
#include "check.hpp"

using namespace kvexport::detail;

namespace {

const float GARBAGE = 1000;

Bundle opened(const std::string& name) {
  return Bundle::open(check::given("KVEXPORT_TEST_SELF_TEST") + "/" + name);
}

// A fault of an engine: changes a call before it runs, or the buffers and logits after it.
struct Fault {
  std::function<void(Call&, Buffers&)> before;
  std::function<void(const Call&, Buffers&, std::vector<float>&)> after;
  std::string provider = "cpu";
  std::int64_t capacity = 0, max_tokens_per_call = 0;  // 0: as the wrapped engine
};

class Faulty final : public Engine {
 public:
  Faulty(const Bundle& bundle, Fault fault)
      : inner_(open_onnxruntime(bundle, "cpu", 1)),
        fault_(std::move(fault)),
        vocab_(bundle.manifest.vocab_size) {}

  const std::string& provider() const override { return fault_.provider; }
  const std::string& version() const override { return inner_->version(); }
  Dtype computes_in() const override { return inner_->computes_in(); }
  Storage& storage() override { return inner_->storage(); }
  std::int64_t max_tokens_per_call() const override {
    return fault_.max_tokens_per_call == 0 ? inner_->max_tokens_per_call() : fault_.max_tokens_per_call;
  }
  std::int64_t capacity() const override {
    return fault_.capacity == 0 ? inner_->capacity() : fault_.capacity;
  }
  bool has_fixed_capacity() const override { return fault_.capacity != 0; }
  std::int64_t growth_step() const override { return has_fixed_capacity() ? 0 : inner_->growth_step(); }

  std::unique_ptr<Binding> bind(Buffers& buffers) override {
    auto bound = std::make_unique<Bound>();
    bound->inner = inner_->bind(buffers), bound->buffers = &buffers;
    return bound;
  }
  const float* run(Binding& binding, const Call& given) override {
    auto& bound = static_cast<Bound&>(binding);
    Call call = given;
    if (fault_.before) fault_.before(call, *bound.buffers);
    const float* logits = inner_->run(*bound.inner, call);
    bound.logits.assign(logits, logits + call.logits * vocab_);
    if (fault_.after) fault_.after(call, *bound.buffers, bound.logits);
    return bound.logits.data();
  }

 private:
  struct Bound final : Binding {
    std::unique_ptr<Binding> inner;
    Buffers* buffers = nullptr;
    std::vector<float> logits;
  };
  std::unique_ptr<Engine> inner_;
  Fault fault_;
  std::int64_t vocab_;
};

// Tests a bundle on an engine that runs the graph of the bundle, or of another one, with a fault.
SelfTestReport examined(const std::string& name, Fault fault = {}, const std::string& runs = "") {
  Bundle bundle = opened(name);
  auto engine = std::make_unique<Faulty>(opened(runs.empty() ? name : runs), std::move(fault));
  return self_test(std::make_shared<const Session>(std::move(bundle), std::move(engine)));
}

nlohmann::json json_of(const SelfTestReport& report) { return nlohmann::json::parse(report.json); }

void require_ok(const SelfTestReport& report) {
  CHECK_EQUAL(report.message.find("reproduces the outputs that PyTorch computed") != std::string::npos, true);
  CHECK_EQUAL(report.verdict, "ok");
  CHECK(report.ok && report.fix.empty());
  const nlohmann::json json = json_of(report);
  for (const auto& each : json.at("checks")) CHECK(each.at("first").is_null() && each.at("rows") > 0);
  CHECK(json.at("generated") == json.at("continuation") && json.at("fix").is_null());
}

void require_verdict(const SelfTestReport& report, const std::string& verdict) {
  CHECK_EQUAL(report.verdict, verdict);
  CHECK(!report.ok && !report.fix.empty());
  CHECK_EQUAL(json_of(report).at("verdict").get<std::string>(), verdict);
}

void require_cache(const SelfTestReport& report) {
  require_verdict(report, "cache");
  CHECK(json_of(report).at("checks").at(0).at("first").is_null());
}

// The values of one head in a slot.
float* slot_of(const Buffer& buffer, std::int64_t head, std::int64_t slot) {
  return static_cast<float*>(buffer.address) + (head * buffer.slots + slot) * buffer.width;
}

void fill_slot(const Buffer& buffer, std::int64_t slot, float value) {
  for (std::int64_t head = 0; head < buffer.heads; ++head)
    std::fill_n(slot_of(buffer, head, slot), buffer.width, value);
}

// Changes the score and position of every token in the states of a layer.
void change_states(Buffers& buffers, int layer,
                   const std::function<void(float& score, float& position_plus_one)>& change) {
  for (const Buffer& buffer : buffers.all) {
    if (buffer.layer != layer || buffer.which != Which::state) continue;
    for (std::int64_t slot = 0; slot < buffer.heads * buffer.slots; ++slot) {
      float* state = static_cast<float*>(buffer.address) + 2 * slot;
      if (state[1] > 0 && state[1] < 0x1p24F) change(state[0], state[1]);  // not in empty or blocked slots
    }
  }
}

float rounded(float value) {  // to bfloat16
  const std::uint32_t bits = bits_of(value, Dtype::bfloat16);
  return as_float(&bits, Dtype::bfloat16);
}

}  // namespace

TEST(undamaged_bundles_pass) {
  for (const char* name : {"sound", "evicting", "ranked", "half", "bloom", "qwen3", "tiny", "windowed"})
    require_ok(examined(name));
}

TEST(engines_with_fixed_capacity_pass) {
  for (const char* name : {"sound", "evicting", "ranked", "half", "windowed"}) {
    Fault fixed_size;
    fixed_size.provider = "tensorrt", fixed_size.capacity = 60, fixed_size.max_tokens_per_call = 5;
    require_ok(examined(name, fixed_size));
  }
}

TEST(a_smaller_engine_runs_as_many_tokens_as_fit) {
  Fault small;
  small.capacity = 21;
  const SelfTestReport report = examined("sound", small);
  require_ok(report);
  const nlohmann::json json = json_of(report);
  for (const auto& each : json.at("checks")) CHECK_EQUAL(each.at("rows").get<int>(), 21);
}

TEST(reports_an_engine_too_small_for_the_test) {
  Fault small;
  small.capacity = 8;
  CHECK_THROWS_WITH(examined("long", small), "must hold the tokens of the bundle's self-test");
}

TEST(reference_outputs_of_another_bundle_fail) {
  const std::shared_ptr<const Session> session =
      std::make_shared<const Session>(opened("sound"), std::make_unique<Faulty>(opened("sound"), Fault{}));
  require_verdict(compare_outputs(session, read_reference_outputs(opened("other"))), "weights");
}

TEST(an_engine_with_wrong_results_fails) {
  for (const auto& [name, other] : {std::pair("sound", "other"), std::pair("evicting", "other-evicting")}) {
    for (const char* provider : {"cuda", "tensorrt"}) {
      Fault elsewhere;
      elsewhere.provider = provider;
      const SelfTestReport report = examined(name, elsewhere, other);
      require_verdict(report, "engine");
      CHECK(report.message.find("first difference: token") != std::string::npos);
      CHECK(report.fix.find("--provider cpu") != std::string::npos);
      require_ok(examined(name, elsewhere));
    }
    require_verdict(examined(name, {}, other), "weights");  // on the CPU only the bundle can be wrong
  }
}

TEST(lower_precision_is_reported) {
  Fault rounds;
  rounds.after = [](const Call& call, Buffers& buffers, std::vector<float>& logits) {
    for (float& value : logits) value = rounded(value);
    for (const Buffer& buffer : buffers.all) {
      if (buffer.which == Which::state) continue;
      const std::int64_t stop = std::min(call.write_index + call.tokens, buffer.slots);
      for (std::int64_t head = 0; head < buffer.heads; ++head) {
        for (float* at = slot_of(buffer, head, std::min(call.write_index, stop));
             at != slot_of(buffer, head, stop); ++at) {
          *at = rounded(*at);
        }
      }
    }
  };
  const SelfTestReport report = examined("sound", rounds);
  require_verdict(report, "precision");
  CHECK(report.message.find("less accurate than float32, as if it computed in float16") != std::string::npos);
}

TEST(a_dropped_cache_write_is_reported) {
  Fault drops;
  drops.after = [](const Call& call, Buffers& buffers, std::vector<float>&) {
    if (call.tokens != 1 || *call.position_ids != 20) return;
    for (const Buffer& buffer : buffers.all) {
      if (buffer.layer == 1 && buffer.which == Which::key) fill_slot(buffer, 20, GARBAGE);
    }
  };
  const SelfTestReport report = examined("sound", drops);
  require_cache(report);
  CHECK(report.message.find("first difference: token 2") != std::string::npos);
}

TEST(a_write_to_the_wrong_slot_is_reported) {
  Fault shifts;
  shifts.after = [](const Call& call, Buffers& buffers, std::vector<float>&) {
    if (call.tokens != 1) return;
    for (const Buffer& buffer : buffers.all) {
      for (std::int64_t head = 0; head < buffer.heads; ++head) {
        std::copy_n(slot_of(buffer, head, call.write_index), buffer.width,
                    slot_of(buffer, head, call.write_index - 1));
      }
      fill_slot(buffer, call.write_index, GARBAGE);
    }
  };
  require_cache(examined("sound", shifts));
}

TEST(a_lost_token_of_a_ring_is_reported) {  // once the ring has begun again at its first slot
  Fault loses;
  loses.after = [](const Call& call, Buffers& buffers, std::vector<float>&) {
    for (const Buffer& buffer : buffers.all) {
      CHECK(buffer.ring && buffer.max_slots == *buffer.ring + 7);
      const std::int64_t position = *call.position_ids;
      if (call.tokens != 1 || position < buffer.max_slots) continue;
      fill_slot(buffer, (position - 2) % buffer.slots, GARBAGE);
    }
  };
  require_cache(examined("windowed", loses));
}

TEST(ignored_write_indices_are_reported) {
  Fault ignores;
  ignores.before = [](Call& call, Buffers&) { call.write_index = 0; };
  require_cache(examined("sound", ignores));
}

TEST(loss_of_contents_on_growth_is_reported) {
  Fault forgets;
  auto grown = std::make_shared<std::int64_t>(0);
  forgets.before = [grown](Call& call, Buffers& buffers) {
    if (call.write_index != 0 && buffers.generation != *grown) {
      for (const Buffer& buffer : buffers.all) std::memset(buffer.address, 0, buffer.bytes());
    }
    *grown = buffers.generation;
  };
  require_cache(examined("sound", forgets));
}

TEST(a_wrong_choice_of_slots_is_reported) {
  Fault chooses;
  chooses.after = [](const Call&, Buffers& buffers, std::vector<float>&) {
    change_states(buffers, 1, [](float& score, float&) { score = -score; });  // evicts the newest token first
  };
  require_cache(examined("evicting", chooses));
}

TEST(an_empty_state_is_reported) {
  Fault forgets;
  forgets.after = [](const Call& call, Buffers& buffers, std::vector<float>&) {
    if (call.tokens == 1)
      change_states(buffers, 0,
                    [](float& score, float& position_plus_one) { score = position_plus_one = 0; });
  };
  require_cache(examined("evicting", forgets));
}

TEST(wrong_eviction_scores_are_reported) {
  Fault scales;
  scales.after = [](const Call&, Buffers& buffers, std::vector<float>&) {
    change_states(buffers, 1, [](float& score, float&) { score *= 1.5F; });
  };
  const SelfTestReport report = examined("ranked", scales);
  require_verdict(report, "weights");
  CHECK_EQUAL(json_of(report).at("checks").at(0).at("first").at("part").get<std::string>(), "score");
}

TEST(remains_of_an_earlier_text_are_reported) {  // correct in the first two runs, wrong when generating
  Fault spoils;
  auto begun = std::make_shared<int>(0);
  spoils.after = [begun](const Call& call, Buffers& buffers, std::vector<float>&) {
    if (*call.position_ids == 0) ++*begun;
    if (*begun != 3 || *call.position_ids != 25) return;
    for (const Buffer& buffer : buffers.all) {
      for (std::int64_t slot = 0; slot < 20; ++slot) fill_slot(buffer, slot, GARBAGE);
    }
  };
  const SelfTestReport report = examined("sound", spoils);
  require_cache(report);
  CHECK(json_of(report).at("checks").at(1).at("first").is_null());
  CHECK(report.message.find("greedy generation differs") != std::string::npos);
}

TEST(nan_is_reported) {
  for (const char* name : {"sound", "evicting", "ranked"}) {
    Fault spoils;
    spoils.after = [](const Call&, Buffers& buffers, std::vector<float>& logits) {
      logits.back() = std::numeric_limits<float>::quiet_NaN();
      for (std::int64_t slot = 0; slot < buffers.all[0].slots; ++slot)
        fill_slot(buffers.all[0], slot, std::nanf(""));
      change_states(buffers, 0, [](float&, float& position_plus_one) { position_plus_one = std::nanf(""); });
    };
    const SelfTestReport report = examined(name, spoils);
    CHECK(!report.ok);
    CHECK(json_of(report).at("checks").at(1).at("norms").is_null());
    CHECK(json_of(report).at("checks").at(1).at("logits").is_null());
  }
}

TEST(refuses_invalid_self_test_files) {
  const Bundle bundle = opened("sound");
  const std::string content = read_file(bundle.file("self_test.json"), 1 << 24);
  parse_reference_outputs(content, bundle.manifest, "it");  // the undamaged file is accepted
  for (std::size_t length = 0; length + 2 < content.size(); length += 97) {
    CHECK_THROWS_WITH(parse_reference_outputs(content.substr(0, length), bundle.manifest, "the file"),
                      "the file");
  }
  CHECK_THROWS_WITH(parse_reference_outputs(content, opened("evicting").manifest, "the file"), "slots");
  CHECK_THROWS_WITH(parse_reference_outputs(std::string(100000, '['), bundle.manifest, "the file"),
                    "the file");
}
