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
  std::optional<std::pair<std::string, std::string>>
      begin_system;  // around the system prompt, replaces `begin`; none: not supported
  std::string generate, answer,
      next;             // `answer`: before an answer in the history; the model generates it itself
  bool strips = false;  // contents are stripped of white space at both ends

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
