// Chat turns and text.json alone; tokenizers compared with Python on the files of tests/cpp/test_cpp_text.py
// (KVEXPORT_TEST_TEXT), with the library in KVEXPORT_TEST_GENAI.
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "bundle/error.hpp"
#include "bundle/file.hpp"
#include "bundle/json.hpp"
#include "check.hpp"
#include "text/text.hpp"

using namespace kvexport::detail;

namespace {

using Ids = std::vector<std::int64_t>;

const std::vector<std::string> agree = {"gpt2", "qwen", "llama3", "llama2", "mistral", "gemma", "phi3"};

Json valid_file() {
  return Json::parse(R"({"format": 1,
    "golden": [{"text": "a", "ids": [1, 2, 3, 9], "plain_ids": [2, 3], "decoded": "a"},
               {"text": "", "ids": [1, 9], "plain_ids": [], "decoded": ""}],
    "special_ids": [9, 1],
    "chat": {"begin": "<", "begin_system": ["{", "}"], "generate": ">", "answer": " ", "next": ";", "strips": true},
    "chat_golden": [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": " a\u3000\n"},
                                  {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
                     "text": "{s}a> b;c>"}]
})");
}

std::string with_change(const std::string& pointer, const Json& value) {
  Json raw = valid_file();
  raw[Json::json_pointer(pointer)] = value;
  return raw.dump();
}

std::string folder(const std::string& name) { return check::given("KVEXPORT_TEST_TEXT") + "/" + name; }

TextFile file_of(const std::string& name) {
  return parse_text(read_file(folder(name) + "/" + text_file, 1 << 24));
}

Text text_of(const std::string& name) {
  return {folder(name), file_of(name), check::given("KVEXPORT_TEST_GENAI")};
}

std::string joined(const Ids& ids) {
  return std::accumulate(ids.begin(), ids.end(), std::string(), [](const std::string& text, std::int64_t id) {
    return text + " " + std::to_string(id);
  });
}

}  // namespace

TEST(formats_chat_turns) {
  const Chat chat{
      "<b><u>", std::pair<std::string, std::string>("<b><s>", "</s><u>"), "</u><a>", " ", "</a><u>", true};
  CHECK_EQUAL(chat.turn(" hello\n", {}, true), "<b><u>hello</u><a>");
  CHECK_EQUAL(chat.turn("hello", "be kind ", true), "<b><s>be kind</s><u>hello</u><a>");
  CHECK_EQUAL(chat.turn("\u00a0\u2003more\x1f", {}, false), "</a><u>more</u><a>");
  CHECK_EQUAL(chat.turn(" \t\n", {}, false), "</a><u></u><a>");
  CHECK_THROWS_WITH(chat.turn("more", "be kind", false), "in the first turn");
  CHECK_THROWS_WITH((Chat{"<b>", {}, "", "", "", false}.turn("hello", "be kind", true)),
                    "must support a system prompt");
}

TEST(reads_text_files) {
  const TextFile file = parse_text(valid_file().dump());
  CHECK(file.before == Ids{1} && file.after == Ids{9});
  CHECK(file.special_ids == (Ids{1, 9}));
  CHECK(file.samples.size() == 2 && file.chat && file.chat->begin_system->second == "}");
  Json none = valid_file();
  none["chat"] = nullptr, none["chat_golden"] = Json::array();
  CHECK(!parse_text(none.dump()).chat);
}

TEST(refuses_damaged_text_files) {
  const std::vector<std::pair<std::string, Json>> damage = {{"/format", 2},
                                                            {"/format", "1"},
                                                            {"/golden", Json::array()},
                                                            {"/golden", nullptr},
                                                            {"/golden/0/ids", {1, 2}},
                                                            {"/golden/0/ids", {1, 3, 2, 9}},
                                                            {"/golden/0/plain_ids", {2.5}},
                                                            {"/golden/0/plain_ids", {-1}},
                                                            {"/golden/0/plain_ids", {std::int64_t{1} << 31}},
                                                            {"/golden/0/text", 1},
                                                            {"/golden/0/decoded", nullptr},
                                                            {"/golden/1/ids", {1}},
                                                            {"/special_ids", {"a"}},
                                                            {"/special_ids", 3},
                                                            {"/chat", 1},
                                                            {"/chat/next", "["},
                                                            {"/chat/begin", nullptr},
                                                            {"/chat/begin_system", {"{"}},
                                                            {"/chat/begin_system", "{}"},
                                                            {"/chat/begin_system", nullptr},
                                                            {"/chat/strips", 1},
                                                            {"/chat/answer", nullptr},
                                                            {"/chat", nullptr},
                                                            {"/chat_golden", nullptr},
                                                            {"/chat_golden/0/messages", Json::array()},
                                                            {"/chat_golden/0/messages/1/role", "assistant"},
                                                            {"/chat_golden/0/messages/3/role", "system"},
                                                            {"/chat_golden/0/messages/0/content", 0},
                                                            {"/chat_golden/0/text", "x"}};
  for (const auto& [pointer, value] : damage) {
    std::string text_value = pointer + " is accepted";
    try {
      parse_text(with_change(pointer, value));
    } catch (const Failure& failure) {
      text_value = failure.failed;
    }
    CHECK_EQUAL(text_value.substr(0, 9), "text.json");
  }
  for (const char* raw : {"", "{", "[]", "null", "\xff", "{\"format\": 1}"})
    CHECK_THROWS_WITH(parse_text(raw), "text.json");
}

TEST(token_ids_equal_those_of_python) {
  for (const std::string& name : agree) {
    const Text text = text_of(name);
    for (const Json& one : Json::parse(read_file(folder(name) + "/vectors.json", 1 << 26))) {
      const std::string text_value = one["text"];
      CHECK_EQUAL(name + joined(text.encode(text_value, true)), name + joined(one["ids"].get<Ids>()));
      CHECK_EQUAL(name + joined(text.encode(text_value, false)), name + joined(one["plain"].get<Ids>()));
    }
  }
}

TEST(streamed_text_equals_that_of_python) {
  for (const std::string& name : agree) {
    const Text text = text_of(name);
    for (const Json& one : Json::parse(read_file(folder(name) + "/vectors.json", 1 << 26))) {
      const Ids ids = one["ids"];
      TextStream stream(text, Ids(ids.begin(), ids.begin() + 1));
      Json pieces = Json::array();
      for (std::size_t i = 1; i < ids.size(); ++i) pieces.push_back(stream.add(ids[i]));
      pieces.push_back(stream.end());
      CHECK_EQUAL(name + pieces.dump(), name + one["pieces"].dump());
    }
  }
}

TEST(chat_turns_follow_the_template) {
  const Text text = text_of("qwen");
  const Ids ids = text.turn("Hi", {}, true);
  CHECK(ids == text.encode("<|im_start|>system\nYou are a "
                           "default.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
                           false));
  CHECK(ids[0] == 1);  // <|im_start|> is one token
}

TEST(a_stream_continues_after_invalid_bytes) {
  const Text text = text_of("llama2");
  const auto byte = [](int value) { return std::int64_t{3} + value; };
  TextStream stream(text, {1});
  std::string text_value;
  for (const std::int64_t id : {byte(0xff), byte('a'), byte('b'), byte('c'), byte('d'), byte('e'), byte('f')})
    text_value += stream.add(id);
  text_value += stream.end();
  CHECK_EQUAL(text_value, "\ufffdabcdef");
  CHECK_EQUAL(text.decode({byte('x'), byte(0xe6), byte('y')}), "x\ufffdy");
  CHECK_EQUAL(text.decode({1, 2}), "");  // only special tokens
  CHECK_EQUAL(text.decode({}), "");
}

TEST(refuses_a_tokenizer_with_other_ids) {
  const std::string library = check::given("KVEXPORT_TEST_GENAI");
  TextFile other = file_of("gpt2");
  ++other.samples[3].plain_ids.back();
  CHECK_THROWS_WITH(Text(folder("gpt2"), other, library),
                    "must give the same tokens as the tokenizer that the bundle was built with");
  other = file_of("gpt2");
  other.samples[2].decoded += "x";
  CHECK_THROWS_WITH(Text(folder("gpt2"), other, library),
                    "must give the same tokens as the tokenizer that the bundle was built with");
  CHECK_THROWS_WITH(text_of("bloom"), "onnxruntime-genai cannot read the bundle's tokenizer");
}

TEST(a_missing_library_is_reported_with_a_fix) {
  folder("");
  CHECK_THROWS_WITH(Text(folder("gpt2"), file_of("gpt2"), "libkvexport-none.so"), "onnxruntime-genai-core");
  CHECK_THROWS_WITH(Text(folder("gpt2"), file_of("gpt2"), "libm.so.6"),
                    "it has no OgaCreateTokenizerFromPath");
  CHECK_THROWS_WITH(Text(folder("none"), file_of("gpt2"), check::given("KVEXPORT_TEST_GENAI")),
                    "cannot read");
}

TEST(refuses_invalid_text) {
  const Text text = text_of("gpt2");
  CHECK_THROWS_WITH(text.encode("a\xff", true), "UTF-8");
  CHECK_THROWS_WITH(text.encode(std::string("a\0b", 3), true), "NUL");
  CHECK(text.encode("", false).empty());
}

TEST(is_thread_safe) {
  const Text text = text_of("qwen");
  const Ids expected = text.encode("Once upon a time", true);
  std::vector<int> same(4, 1);
  std::vector<std::thread> threads;
  for (int& one : same)
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i)
        one = one && text.encode("Once upon a time", true) == expected && !text.decode(expected).empty();
    });
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(std::accumulate(same.begin(), same.end(), 0), 4);
}

TEST(opens_and_closes_a_hundred_times) {
  for (int i = 0; i < 100; ++i) text_of("gpt2");
}
