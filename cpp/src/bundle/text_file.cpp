#include "bundle/text_file.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bundle/error.hpp"
#include "bundle/json.hpp"

namespace kvexport::detail {
namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::int64_t MAX_ID = INT32_MAX;

TokenizerSample sample_of(const Table& table) {
  Ids ids = table.integers("ids", 0, MAX_ID), plain_ids = table.integers("plain_ids", 0, MAX_ID);
  return {table.text("text"), std::move(ids), std::move(plain_ids), table.text("decoded")};
}

Chat chat_of(const Table& table) {
  Chat chat;
  if (!table.is_null("begin_system")) {
    const std::vector<std::string> around = table.texts("begin_system");
    if (around.size() != 2) table.fail("begin_system", "null or two strings");
    chat.begin_system = {around[0], around[1]};
  }
  chat.begin = table.text("begin");
  chat.generate = table.text("generate");
  chat.answer = table.text("answer");
  chat.next = table.text("next");
  chat.strips = table.boolean("strips");
  return chat;
}

std::vector<Message> messages_of(const Table& table) {
  std::vector<Message> messages;
  for (const Table& message : table.tables("messages"))
    messages.push_back({message.text("role"), message.text("content")});
  const std::size_t first = !messages.empty() && messages[0].role == "system" ? 1 : 0;
  bool valid = (messages.size() - first) % 2 == 1;
  for (std::size_t i = first; i < messages.size(); ++i)
    valid = valid && messages[i].role == ((i - first) % 2 == 0 ? "user" : "assistant");
  if (!valid)
    table.fail("messages", "an optional system message, then user and assistant in turn, the last by user");
  return messages;
}

// Finds the special tokens before and after the plain ids, which must be the same in every sample.
void find_special_tokens(TextFile& file, const Table& table) {
  const auto sample = std::find_if(file.samples.begin(), file.samples.end(),
                                   [](const TokenizerSample& one) { return !one.plain_ids.empty(); });
  if (sample == file.samples.end()) table.fail("golden", "a sample with tokens");
  const auto start =
      std::search(sample->ids.begin(), sample->ids.end(), sample->plain_ids.begin(), sample->plain_ids.end());
  if (start == sample->ids.end()) table.fail("golden", "samples whose ids contain their plain_ids");
  file.before.assign(sample->ids.begin(), start);
  file.after.assign(start + static_cast<std::ptrdiff_t>(sample->plain_ids.size()), sample->ids.end());
  for (const TokenizerSample& one : file.samples) {
    Ids expected = file.before;
    expected.insert(expected.end(), one.plain_ids.begin(), one.plain_ids.end());
    expected.insert(expected.end(), file.after.begin(), file.after.end());
    if (expected != one.ids)
      table.fail("golden", "samples with the same special tokens around their plain_ids");
  }
}

}  // namespace

TextFile parse_text(std::string_view text, const std::string& path) {
  const Json json = parse_json(text, path);
  const Table table(json, path);
  table.integer("format", 1, 1);
  TextFile file;
  for (const Table& sample : table.tables("golden")) file.samples.push_back(sample_of(sample));
  if (file.samples.empty()) table.fail("golden", "at least one sample");
  file.special_ids = table.integers("special_ids", 0, MAX_ID);
  std::sort(file.special_ids.begin(), file.special_ids.end());
  find_special_tokens(file, table);
  if (!table.is_null("chat")) file.chat = chat_of(table.table("chat"));
  for (const Table& conversation : table.tables("chat_golden")) {
    const std::vector<Message> messages = messages_of(conversation);
    const std::string expected = conversation.text("text");
    const bool possible = file.chat && (messages[0].role != "system" || file.chat->begin_system.has_value());
    if (!possible || file.chat->conversation(messages) != expected)
      conversation.fail("text", "the text that chat gives for the conversation");
  }
  return file;
}

}  // namespace kvexport::detail
