// Runs the library for the Python tests in tests/cpp: one JSON command per line on standard input, one JSON
// answer per line on standard output. Uses the public header only. Logits are printed as hexadecimal bytes,
// to compare them bit by bit.
#include <kvexport/kvexport.hpp>

#include <filesystem>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

namespace {

using Json = nlohmann::json;

std::map<std::string, kvexport::Session> sessions;
std::map<std::string, kvexport::Cache> caches;

std::string hex(const kvexport::Logits& logits) {
  constexpr const char* digits = "0123456789abcdef";
  const auto* bytes = reinterpret_cast<const unsigned char*>(logits.values);
  std::string text;
  for (std::size_t at = 0; at < static_cast<std::size_t>(logits.vocab_size) * sizeof(float); ++at) {
    text += {digits[bytes[at] >> 4U], digits[bytes[at] & 15U]};
  }
  return text;
}

Json open(const Json& given) {
  kvexport::OpenOptions options;
  options.provider = given.value("provider", options.provider);
  options.threads = given.value("threads", 1);
  options.verify = given.value("verify", options.verify);
  options.chunk = given.value("chunk", options.chunk);
  options.text_library = given.value("text_library", std::string());
  kvexport::Session session(given.at("bundle").get<std::string>(), options);
  const kvexport_info& info = session.info();
  Json properties{
      {"source", info.source},
      {"dtype", info.dtype},
      {"provider", info.provider},
      {"engine", info.engine},
      {"vocab_size", info.vocab_size},
      {"capacity", info.capacity},
      {"budget", info.budget},
      {"bos_token_id", info.bos_token_id},
      {"has_text", info.has_text != 0},
      {"has_chat", info.has_chat != 0},
      {"text_missing", info.text_missing},
      {"eos_token_ids", kvexport::Ids(info.eos_token_ids, info.eos_token_ids + info.eos_token_count)}};
  sessions.erase(given.at("session"));
  sessions.emplace(given.at("session"), std::move(session));
  return properties;
}

Json generate(kvexport::Cache& cache, const Json& given) {
  kvexport::GenerateOptions options;
  options.max_new_tokens = given.value("max_new_tokens", options.max_new_tokens);
  if (given.contains("temperature")) options.temperature = given.at("temperature").get<double>();
  options.top_k = given.value("top_k", options.top_k);
  options.top_p = given.value("top_p", options.top_p);
  if (given.contains("seed")) options.seed = given.at("seed").get<std::uint64_t>();
  if (given.contains("stop_tokens")) options.stop_tokens = given.at("stop_tokens").get<kvexport::Ids>();
  options.stop_texts = given.value("stop_texts", options.stop_texts);
  const std::size_t patience = given.value(
      "patience", std::size_t{1} << 30U);  // the callback ends the generation after as many tokens
  kvexport::Ids tokens;
  std::vector<std::string> pieces;
  std::string rest;
  const kvexport::Ids prompt = given.at("ids");
  const auto finish = cache.generate(prompt, options, [&](std::int64_t token, std::string_view text) {
    if (token < 0) {
      rest = text;
      return true;
    }
    tokens.push_back(token);
    pieces.emplace_back(text);
    return tokens.size() < patience;
  });
  constexpr const char* names[] = {"stop", "length", "capacity", "callback"};
  return {
      {"tokens", tokens}, {"pieces", pieces}, {"rest", rest}, {"finish", names[static_cast<int>(finish)]}};
}

Json of_cache(kvexport::Cache& cache, const std::string& what, const Json& given) {
  if (what == "prefill") return hex(cache.prefill(given.at("ids").get<kvexport::Ids>()));
  if (what == "step") return hex(cache.step(given.at("id")));
  if (what == "generate") return generate(cache, given);
  if (what == "turn") return cache.turn(given.at("text"), given.value("system", std::string()));
  if (what == "save") cache.save(given.at("file"));
  if (what == "clear") cache.clear();
  return {{"length", cache.length()}, {"capacity", cache.capacity()}, {"bytes", cache.bytes()}};
}

Json answer(const Json& given) {
  const std::string what = given.at("do");
  if (what == "open") return open(given);
  if (what == "chdir") return std::filesystem::current_path(given.at("folder").get<std::string>()), nullptr;
  if (what == "free") return caches.erase(given.at("cache"));
  if (what == "close") return sessions.erase(given.at("session"));
  if (what == "new" || what == "load") {
    kvexport::Session& session = sessions.at(given.at("session"));
    const std::int64_t capacity = given.value("capacity", std::int64_t{0});
    caches.erase(given.at("cache"));
    auto made = what == "new" ? session.new_cache(capacity) : session.load(given.at("file"), capacity);
    return of_cache(caches.emplace(given.at("cache"), std::move(made)).first->second, "", given);
  }
  if (given.contains("cache")) return of_cache(caches.at(given.at("cache")), what, given);
  kvexport::Session& session = sessions.at(given.at("session"));
  if (what == "encode") return session.encode(given.at("text"), given.value("special", true));
  if (what == "decode") return session.decode(given.at("ids").get<kvexport::Ids>());
  if (what == "memory") return session.memory(given.value("capacity", std::int64_t{0})).cache_bytes;
  if (what == "self_test") return Json::parse(session.self_test());
  throw std::invalid_argument("there is no command " + what);
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    Json answer_json;
    try {
      answer_json["ok"] = answer(Json::parse(line));
    } catch (const kvexport::Error& error) {
      answer_json["error"] = {{"code", error.code()}, {"failed", error.failed()},
                              {"got", error.got()},   {"expected", error.expected()},
                              {"fix", error.fix()},   {"message", error.what()}};
    } catch (const std::exception& error) {
      answer_json["wrong"] = error.what();
    }
    std::cout << answer_json.dump(-1, ' ', true, Json::error_handler_t::replace) << std::endl;
  }
  caches.clear();
  sessions.clear();
  return 0;
}
