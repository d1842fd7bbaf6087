#include "runtime/self_test.hpp"

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "bundle/error.hpp"
#include "runtime/self_test_runs.hpp"

namespace kvexport::detail {

namespace {

using Ordered = nlohmann::ordered_json;

constexpr const char* COPY =
    "copy the bundle again as a whole, or build it again: kvexport build CHECKPOINT -o BUNDLE";

// Where a run first exceeds the tolerance: the row, and the part of a layer, or "logits" or "choice".
struct Location {
  std::int64_t row;
  std::optional<std::size_t> layer;
  const char* part;

  std::string text() const {
    return "token " + std::to_string(row) + ", " + part +
           (layer ? " of layer " + std::to_string(*layer) : "");
  }
};

// Largest errors of one run; `first`: where an error first exceeds the tolerance.
struct Check {
  const char* name;
  std::size_t rows = 0;
  double logits = 0, norms = 0, choice = 0;
  std::optional<Location> first;

  bool within(const Tolerance& tolerance) const {
    return logits <= tolerance.logits && norms <= tolerance.norms && choice <= tolerance.tie;
  }
};

double relative_error(double number, double reference_row) {
  return std::fabs(number - reference_row) / std::max(reference_row, SELF_TEST_FLOOR);
}

// Whether the reference's two most likely tokens are too close to tell which one a correct runtime chooses.
bool is_tie(const Row& reference_row, const Tolerance& tolerance) {
  return reference_row.margin / std::max(reference_row.rms, SELF_TEST_FLOOR) <= tolerance.tie;
}

// Compares rows with those of the reference, from the first one on.
Check check(const char* name, const std::vector<Measured>& rows, const ReferenceOutputs& reference,
            const Tolerance& tolerance) {
  Check result{name, rows.size(), 0, 0, 0, {}};
  const auto wrong = [&](std::int64_t row, std::optional<std::size_t> layer, const char* part) {
    if (!result.first) result.first = Location{row, layer, part};
  };
  for (std::size_t at = 0; at < rows.size(); ++at) {
    const Measured& row = rows[at];
    const Row& reference_row = reference.rows[at];
    const std::int64_t token = reference.first_row + static_cast<std::int64_t>(at);
    for (std::size_t layer = 0; layer < reference_row.key_norms.size(); ++layer) {
      const auto part = [&](const char* which, double error) {
        result.norms = larger(result.norms, error);
        if (!(error <= tolerance.norms)) wrong(token, layer, which);
      };
      part("key", relative_error(row.key_norms[layer], reference_row.key_norms[layer]));
      part("value", relative_error(row.value_norms[layer], reference_row.value_norms[layer]));
      part("score", row.scores[layer]);
    }
    const double scale = std::max(reference_row.rms, SELF_TEST_FLOOR);
    double error = relative_error(row.rms, reference_row.rms);
    for (std::size_t index = 0; index < reference_row.values.size(); ++index) {
      error = larger(error, std::fabs(row.values[index] - reference_row.values[index]) / scale);
    }
    result.logits = larger(result.logits, error);
    if (!(error <= tolerance.logits)) wrong(token, std::nullopt, "logits");
    if (row.likeliest == reference_row.likeliest) continue;
    result.choice = larger(result.choice, reference_row.margin / scale);
    if (!is_tie(reference_row, tolerance)) wrong(token, std::nullopt, "choice");
  }
  return result;
}

std::optional<Dtype> lower(Dtype dtype) {
  if (dtype == Dtype::float32) return Dtype::float16;
  if (dtype == Dtype::float16) return Dtype::bfloat16;
  return std::nullopt;
}

// The verdict as a sentence, and the fix.
std::array<std::string, 2> sentences(const std::string& verdict, const Session& session,
                                     const std::optional<Location>& first) {
  const std::string &provider = session.engine->provider(), &version = session.engine->version();
  const std::string rebuild_engine =
      provider == "tensorrt" ? "build the engine again: kvexport engine BUNDLE --force" : "";
  const std::string runs = version + " on " + provider,
                    where = first ? "; first difference: " + first->text() : "";
  const auto fix_or_rebuild = [&](const std::string& remedy) {
    return rebuild_engine.empty() ? remedy : rebuild_engine;
  };
  if (verdict == "ok") {
    return {runs + " reproduces the outputs that PyTorch computed when the bundle was built", ""};
  }
  if (verdict == "weights") {
    return {runs +
                " computes other numbers than the PyTorch reference: the bundle's files come from two "
                "builds, or were changed" +
                where,
            std::string(COPY) + "; to find the difference: kvexport validate BUNDLE --provider cpu"};
  }
  if (verdict == "engine") {
    return {runs + " computes other numbers than the PyTorch reference" + where,
            "check the bundle: kvexport self-test BUNDLE --provider cpu; if that is ok, " +
                fix_or_rebuild("update ONNX Runtime, or run with --provider cpu")};
  }
  if (verdict == "precision") {
    const std::string dtype = name_of(session.manifest().dtype),
                      lower_dtype = name_of(*lower(session.manifest().dtype));
    return {runs + " is less accurate than " + dtype + ", as if it computed in " + lower_dtype + where,
            fix_or_rebuild("build the bundle again with --dtype " + lower_dtype +
                           " if that is sufficient; otherwise " + COPY)};
  }
  return {runs + ": prefill matches the reference, decode does not: the KV cache is not updated correctly" +
              (first ? where : "; greedy generation differs"),
          fix_or_rebuild("install another version of ONNX Runtime, or run with another --provider")};
}

Ordered json_of(const Check& check) {
  Ordered first;
  if (check.first) {
    const Location& location = *check.first;
    first = {{"row", location.row},
             {"layer", location.layer ? Ordered(*location.layer) : Ordered()},
             {"part", location.part}};
  }
  const auto number = [](double error) { return std::isfinite(error) ? Ordered(error) : Ordered(); };
  return {{"name", check.name},
          {"rows", check.rows},
          {"logits", number(check.logits)},
          {"norms", number(check.norms)},
          {"choice", number(check.choice)},
          {"first", first}};
}

SelfTestReport report(const std::string& verdict, std::string message, std::string fix,
                      const Session& session, const Tolerance& tolerance,
                      const std::vector<Check>& checks = {}, std::int64_t generated = 0,
                      std::int64_t continuation = 0) {
  Ordered listed = Ordered::array();
  for (const Check& each : checks) listed.push_back(json_of(each));
  const Ordered json{
      {"verdict", verdict},
      {"said", message},
      {"fix", fix.empty() ? Ordered() : Ordered(fix)},
      {"provider", session.engine->provider()},
      {"engine", session.engine->version()},
      {"dtype", name_of(session.manifest().dtype)},
      {"tolerance", {{"logits", tolerance.logits}, {"norms", tolerance.norms}, {"tie", tolerance.tie}}},
      {"checks", listed},
      {"generated", generated},
      {"continuation", continuation}};
  return {verdict == "ok", verdict, json.dump(), std::move(message), std::move(fix)};
}

}  // namespace

SelfTestReport self_test(const std::shared_ptr<const Session>& session) {
  const std::string& provider = session->engine->provider();
  if (!session->verified && provider != "tensorrt") session->bundle.verify({data_file});
  const ReferenceOutputs reference = read_reference_outputs(session->bundle);
  if (session->manifest().files.at(data_file).sha256 == reference.weights_sha256)
    return compare_outputs(session, reference);
  const std::string message =
      std::string(data_file) + " differs from that of the self-test: the bundle's files come from two builds";
  return report("weights", message, COPY, *session, reference.tolerance(provider, session->manifest().dtype));
}

SelfTestReport compare_outputs(const std::shared_ptr<const Session>& session,
                               const ReferenceOutputs& reference) {
  const std::string& provider = session->engine->provider();
  const Dtype dtype = session->manifest().dtype;
  const Tolerance& tolerance = reference.tolerance(provider, dtype);
  const Tolerance& lower_tolerance = reference.tolerance(provider, lower(dtype).value_or(dtype));
  Runs runs(session, reference);
  if (runs.tokens <= reference.first_row) {
    throw Failure(
        Code::cannot_run_here, "the engine's capacity must hold the tokens of the bundle's self-test",
        "a capacity of " + std::to_string(runs.tokens), std::to_string(reference.first_row + 1) + " or more",
        "kvexport engine BUNDLE --capacity " + std::to_string(reference.tokens.size()) + " --force");
  }
  const Check at_once = check("at once", runs.at_once(), reference, tolerance);
  const Check step_by_step = check("step by step", runs.step_by_step(), reference, tolerance);
  std::int64_t reproducible = 0;
  const auto chosen_by = [&](std::int64_t token) {
    return static_cast<std::size_t>(token - 1 - reference.first_row);
  };
  while (runs.prompt + reproducible < runs.tokens &&
         !is_tie(reference.rows[chosen_by(runs.prompt + reproducible)], tolerance))
    ++reproducible;
  const std::int64_t generated = runs.generated(reproducible);
  std::string verdict = provider == "cpu" ? "weights" : "engine";
  if (at_once.within(tolerance)) {
    verdict = step_by_step.within(tolerance) && generated == reproducible ? "ok" : "cache";
  } else if (at_once.within(lower_tolerance) && step_by_step.within(lower_tolerance)) {
    verdict = "precision";
  }
  auto [message, fix] = sentences(verdict, *session, at_once.first ? at_once.first : step_by_step.first);
  return report(verdict, std::move(message), std::move(fix), *session, tolerance, {at_once, step_by_step},
                generated, reproducible);
}

}  // namespace kvexport::detail
