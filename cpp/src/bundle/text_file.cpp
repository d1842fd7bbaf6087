#include "bundle/text_file.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bundle/error.hpp"
#include "bundle/json.hpp"

namespace kvexport::detail {
namespace {

using Ids = std::vector<std::int64_t>;

Ids token_ids(const Reader& raw, const std::string& key) {
  Ids ids = raw.integers(key);
  for (const std::int64_t id : ids)
    if (id < 0 || id > INT32_MAX) raw.fail(key, "holds what is no token id");
  return ids;
}

Chat chat_of(const Reader& raw) {
  Chat chat;
  chat.begin = raw.string("begin");
  if (raw.value("begin_system").is_array()) {
    const std::vector<std::string> around = raw.strings("begin_system");
    if (around.size() != 2) raw.fail("begin_system", "is not two texts");
    chat.begin_system = {around[0], around[1]};
  } else if (!raw.value("begin_system").is_null()) {
    raw.fail("begin_system", "is neither null nor two texts");
  }
  chat.generate = raw.string("generate");
  chat.answer = raw.string("answer");
  chat.next = raw.string("next");
  chat.strips = raw.boolean("strips");
  return chat;
}

std::vector<Message> messages_of(const Reader& raw) {
  std::vector<Message> messages;
  for (const Reader& each : raw.objects("messages"))
    messages.push_back({each.string("role"), each.string("content")});
  const std::size_t first = !messages.empty() && messages[0].role == "system" ? 1 : 0;
  bool sound = (messages.size() - first) % 2 == 1;
  for (std::size_t i = first; i < messages.size(); ++i)
    sound = sound && messages[i].role == ((i - first) % 2 == 0 ? "user" : "assistant");
  if (!sound) raw.fail("messages", "is no conversation that a user ends");
  return messages;
}

// Finds the special tokens before and after the plain ids, which must be the same in every sample.
void find_special_tokens(TextFile& file, const Reader& raw) {
  const auto sample = std::find_if(file.samples.begin(), file.samples.end(),
                                   [](const TokenizerSample& one) { return !one.plain_ids.empty(); });
  if (sample == file.samples.end()) raw.fail("golden", "holds no text that has tokens");
  const auto start =
      std::search(sample->ids.begin(), sample->ids.end(), sample->plain_ids.begin(), sample->plain_ids.end());
  if (start == sample->ids.end()) raw.fail("golden", "has ids that do not hold their plain_ids");
  file.before.assign(sample->ids.begin(), start);
  file.after.assign(start + static_cast<std::ptrdiff_t>(sample->plain_ids.size()), sample->ids.end());
  for (const TokenizerSample& one : file.samples) {
    Ids expected = file.before;
    expected.insert(expected.end(), one.plain_ids.begin(), one.plain_ids.end());
    expected.insert(expected.end(), file.after.begin(), file.after.end());
    if (expected != one.ids) raw.fail("golden", "has special tokens that differ from text to text");
  }
}

}  // namespace

TextFile parse_text(std::string_view text) {
  const Json json = parse_json(text, text_file);
  const Reader raw(json, text_file);
  if (raw.integer("format") != 1) raw.fail("format", "is not 1");
  TextFile file;
  for (const Reader& one : raw.objects("golden"))
    file.samples.push_back(
        {one.string("text"), token_ids(one, "ids"), token_ids(one, "plain_ids"), one.string("decoded")});
  file.special_ids = token_ids(raw, "special_ids");
  std::sort(file.special_ids.begin(), file.special_ids.end());
  find_special_tokens(file, raw);
  if (!raw.value("chat").is_null()) file.chat = chat_of(raw.object("chat"));
  for (const Reader& one : raw.objects("chat_golden")) {
    const std::vector<Message> messages = messages_of(one);
    if (messages[0].role == "system" && !(file.chat && file.chat->begin_system))
      one.fail("messages", "has a system prompt, and the chat takes none");
    if (!file.chat || file.chat->conversation(messages) != one.string("text"))
      one.fail("text", "is not what the chat's strings give");
  }
  return file;
}

}  // namespace kvexport::detail
