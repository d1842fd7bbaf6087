// A chat template in the form of constant strings around the messages.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kvexport::detail {

struct Message {
  std::string role, content;
};

// A conversation is `begin`, user, `generate`, `answer`, assistant, `next`, user, `generate`, and so on.
struct Chat {
  std::string begin;  // before the first user message if there is no system prompt
  // Around the system prompt, in place of `begin`; none: the template has no system prompt.
  std::optional<std::pair<std::string, std::string>> begin_system;
  std::string generate;  // after a user message, up to where the assistant answers
  std::string answer;    // before an answer in the history; the model generates it itself
  std::string next;      // after an answer, up to the next user message
  bool strips = false;   // contents are stripped of white space at both ends

  // Text of a user's turn, up to the point where the assistant answers. `begins`: first turn of the
  // conversation. Throws Failure (usage) if there is a system prompt in a later turn, or the template takes
  // none.
  std::string turn(const std::string& text, const std::optional<std::string>& system, bool begins) const;

  // Text of a whole conversation, which ends with a user's message.
  std::string conversation(const std::vector<Message>& messages) const;

 private:
  std::string content_text(const std::string& content) const;
};

}  // namespace kvexport::detail
