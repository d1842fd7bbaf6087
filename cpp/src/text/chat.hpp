// A chat template's reduced form: the strings around what people and the model say. Knows no Jinja and no
// tokens.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kvexport::detail {

struct Message {
  std::string role, content;
};

// A conversation is its beginning, then user, `generate`, `answer`, assistant, `next`, user, `generate`, and
// so on.
struct Chat {
  std::string begin;  // before the first user's turn without a system prompt
  std::optional<std::pair<std::string, std::string>>
      begin_system;  // around one, in its place; none: the template takes none
  std::string generate, answer,
      next;             // `answer`: what the assistant itself is to write before its words, never fed
  bool strips = false;  // contents lose the white space at both ends first

  // What to feed for a user's turn, up to where the assistant answers; `begins`: it is the conversation's
  // first. Throws Failure (usage): a system prompt later than that, or with a template that takes none.
  std::string turn(const std::string& text, const std::optional<std::string>& system, bool begins) const;

  // The same of a whole conversation, whose last message is a user's.
  std::string conversation(const std::vector<Message>& messages) const;

 private:
  std::string said(const std::string& content) const;
};

}  // namespace kvexport::detail
