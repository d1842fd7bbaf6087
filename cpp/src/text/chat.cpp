#include "text/chat.hpp"

#include <array>
#include <string_view>

#include "bundle/error.hpp"

namespace kvexport::detail {
namespace {

// Characters that Python's str.strip removes.
constexpr std::array<std::string_view, 29> white = {
    "\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",   "\x1e",   "\x1f",   " ",
    "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
    "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
};

std::string_view stripped(std::string_view text) {
  const auto cut = [&text](bool front) {
    for (const std::string_view space : white) {
      if (text.size() < space.size()) continue;
      if (front ? text.substr(0, space.size()) == space : text.substr(text.size() - space.size()) == space) {
        front ? text.remove_prefix(space.size()) : text.remove_suffix(space.size());
        return true;
      }
    }
    return false;
  };
  while (cut(true)) continue;
  while (cut(false)) continue;
  return text;
}

}  // namespace

std::string Chat::content_text(const std::string& content) const {
  return strips ? std::string(stripped(content)) : content;
}

std::string Chat::turn(const std::string& text, const std::optional<std::string>& system, bool begins) const {
  if (!begins) {
    if (system)
      throw Failure(Code::usage, "a system prompt must be in the first turn of a conversation", "", "",
                    "leave it out, or start a new conversation in another cache");
    return next + content_text(text) + generate;
  }
  if (!system) return begin + content_text(text) + generate;
  if (!begin_system)
    throw Failure(Code::usage, "the chat template must support a system prompt before the conversation", "",
                  "", "leave it out, or put it at the start of the user's text");
  return begin_system->first + content_text(*system) + begin_system->second + content_text(text) + generate;
}

std::string Chat::conversation(const std::vector<Message>& messages) const {
  std::size_t at = 0;
  std::optional<std::string> system;
  if (messages.at(0).role == "system") system = messages[at++].content;
  std::string text = turn(messages.at(at++).content, system, true);
  for (; at < messages.size(); ++at)
    text += messages[at].role == "assistant" ? answer + content_text(messages[at].content)
                                             : turn(messages[at].content, {}, false);
  return text;
}

}  // namespace kvexport::detail
