// Safetensors files: Python's are read, Python reads those written here (tests/cpp/test_cpp_readers.py), and
// damage is always detected.
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <random>

#include "bundle/error.hpp"
#include "bundle/safetensors.hpp"
#include "check.hpp"
#include "files.hpp"

using namespace kvexport::detail;

namespace {

std::string with_length(const std::string& header) {
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xFF);
  return length + header;
}

TensorHeader parsed(const std::string& header, std::size_t data) {
  const std::string start = with_length(header);
  return parse_header(start, start.size() + data, "x");
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"a": {"dtype": ")" + dtype + R"(", "shape": )" + shape + R"(, "data_offsets": )" + offsets +
         "}}";
}

const std::vector<TensorEntry> three{{"past.0.key", "F32", {1, 2, 3}, 0, 0},
                                     {"past.0.value", "F16", {1, 2}, 0, 0},
                                     {"none", "BF16", {0, 4}, 0, 0}};

// The data of `three`, 28 bytes.
std::string data() {
  std::string bytes(28, '\0');
  for (std::size_t i = 0; i < 6; ++i) {
    const float value = static_cast<float>(i);
    std::memcpy(bytes.data() + 4 * i, &value, 4);
  }
  bytes.replace(24, 4, std::string("\x00\x38\x00\xC0", 4));  // 0.5 and -2 as float16
  return bytes;
}

void write_three(const std::string& path,
                 const Metadata& metadata = {{"kvexport", "test"},
                                             {"state", R"({"sha256":"0", "x": "é"})"}}) {
  TensorWriter writer(path, three, metadata);
  const std::string bytes = data();
  writer.write(bytes.data(), 5);
  writer.write(bytes.data() + 5, bytes.size() - 5);
  writer.commit();
}

std::vector<std::string> listing(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    names.push_back(entry.path().filename().string());
  return names;
}

}  // namespace

TEST(reads_files_of_python) {
  const TensorReader file(check::reader_file("sound.safetensors"));
  CHECK_EQUAL(file.header().tensors.size(), 5U);
  CHECK_EQUAL(file.header().metadata.at("text"), "quoted \"é\" \n");
  const TensorEntry* f32 = file.header().find("f32");
  CHECK(f32 != nullptr && f32->dtype == "F32" && f32->shape == (std::vector<std::int64_t>{1, 2, 3}));
  float values[6];
  file.read(*f32, values, sizeof values);
  CHECK(values[0] == 0 && values[5] == 5);
  file.read(*f32, values, 4, 8);
  CHECK_EQUAL(values[0], 2.0F);
  const TensorEntry* bf16 = file.header().find("bf16");
  CHECK(bf16 != nullptr && bf16->dtype == "BF16" && bf16->bytes() == 4);
  CHECK(file.header().find("i64")->shape.empty() && file.header().find("none")->bytes() == 0);
  CHECK(file.header().find("other") == nullptr);
  CHECK_THROWS_WITH(file.verify(), "its sha256 differs");  // the safetensors library writes no hash
}

TEST(reads_its_own_files) {
  const Folder folder;
  write_three(folder.file("c"));
  CHECK_EQUAL(listing(folder.path).size(), 1U);
  const TensorReader file(folder.file("c"));
  file.verify();
  CHECK_EQUAL(file.header().metadata.at("kvexport"), "test");
  CHECK_EQUAL(file.header().metadata.at("state"), R"({"sha256":"0", "x": "é"})");
  CHECK_EQUAL(file.header().data % 8, 0U);
  std::string read(24, '\0');
  file.read(file.header().tensors.at(0), read.data(), 24);
  CHECK(read == data().substr(0, 24));
}

TEST(new_files_have_default_permissions) {
  const Folder folder;
  write_three(folder.file("c"));
  write(folder.file("other"), "");
  CHECK(std::filesystem::status(folder.file("c")).permissions() ==
        std::filesystem::status(folder.file("other")).permissions());
}

TEST(detects_every_changed_bit_of_the_data) {
  const Folder folder;
  write_three(folder.file("c"));
  const std::string whole = contents(folder.file("c"));
  for (std::size_t at = whole.size() - 28; at < whole.size(); ++at) {
    std::string spoiled = whole;
    spoiled[at] ^= 4;
    write(folder.file("c"), spoiled);
    CHECK_THROWS_WITH(TensorReader(folder.file("c")).verify(), "its sha256 differs");
  }
}

TEST(refuses_truncated_files) {
  const Folder folder;
  write_three(folder.file("c"));
  const std::string whole = contents(folder.file("c"));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write(folder.file("c"), whole.substr(0, size));
    CHECK_THROWS_WITH(TensorReader(folder.file("c")), "must be a valid safetensors file");
  }
  write(folder.file("c"), whole + "x");
  CHECK_THROWS_WITH(TensorReader(folder.file("c")), "the size of its data differs from its header");
}

TEST(damaged_headers_throw_failure_only) {
  const Folder folder;
  write_three(folder.file("c"));
  const std::string whole = contents(folder.file("c"));
  std::mt19937 random(0);
  std::size_t refused = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string spoiled = whole;
    for (int flips = 0; flips < 1 + i % 3; ++flips)
      spoiled[random() % (whole.size() - 28)] ^= static_cast<char>(1 << random() % 8);
    try {
      parse_header(spoiled, spoiled.size(), "x");  // a changed name or metadata is valid
    } catch (const Failure&) {
      ++refused;
    }
  }
  CHECK(refused > 2500);
}

TEST(refuses_invalid_headers) {
  CHECK_EQUAL(parsed(one("F32", "[2, 3]", "[0, 24]"), 24).tensors.at(0).bytes(), 24U);
  CHECK_EQUAL(parsed("{}", 0).tensors.size(), 0U);
  CHECK_THROWS_WITH(parsed(one("F32", "[2, 3]", "[0, 20]"), 20), "does not match the size of its data");
  CHECK_THROWS_WITH(parsed(one("F7", "[1]", "[0, 4]"), 4), "is not supported");
  CHECK_THROWS_WITH(parsed(one("F32", "[-1, -4]", "[0, 16]"), 16), "is not valid");
  CHECK_THROWS_WITH(parsed(one("F32", "[4611686018427387904, 4]", "[0, 0]"), 0), "is not valid");
  CHECK_THROWS_WITH(parsed(one("F32", "[1.0]", "[0, 4]"), 4), "a list of integers");
  CHECK_THROWS_WITH(parsed(one("F32", "[1]", "[4, 0]"), 4), "the start and the end");
  CHECK_THROWS_WITH(parsed(one("F32", "[1]", "[-4, 0]"), 4), "data_offsets[0] has an invalid value");
  CHECK_THROWS_WITH(parsed(one("F32", "[1]", "[0, 4, 8]"), 4), "the start and the end");
  CHECK_THROWS_WITH(parsed(one("F32", "[1]", "[4, 8]"), 8), "overlap or leave a gap");
  CHECK_THROWS_WITH(parsed(one("F32", "[1]", "[0, 4]"), 8), "the size of its data differs from its header");
  CHECK_THROWS_WITH(
      parsed(
          R"({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}})",
          3),
      "overlap or leave a gap");
  CHECK_THROWS_WITH(
      parsed(R"({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "strides": [1]}})", 1),
      "has an unknown key");
  CHECK_THROWS_WITH(parsed(R"({"__metadata__": {"a": 1}})", 0), "a has an invalid value");
  CHECK_THROWS_WITH(parsed(R"({"__metadata__": 1})", 0), "must be a table");
  CHECK_THROWS_WITH(parsed(R"({"a": {}, "a": {}})", 0), "a duplicate key");
  CHECK_THROWS_WITH(parsed("[]", 0), "must be a table");
  CHECK_THROWS_WITH(parsed("", 0), "must be JSON");
  CHECK_THROWS_WITH(parse_header(std::string(8, '\xFF'), 8, "x"), "its header is too long");
  CHECK_THROWS_WITH(parse_header(with_length(std::string(100, ' ')).substr(0, 50), 108, "x"), "truncated");
}

TEST(reports_missing_files) {
  CHECK_THROWS_WITH(TensorReader("/nowhere/c"), "/nowhere/c cannot be read: No such file");
  CHECK_THROWS_WITH(TensorReader("/"), "cannot be read: Is a directory");
  CHECK_THROWS_WITH(TensorReader("/dev/zero"), "must be a regular file");
}

TEST(an_uncommitted_file_is_removed) {
  const Folder folder;
  write(folder.file("c"), "before");
  {
    TensorWriter writer(folder.file("c"), three, {});
  }
  try {
    TensorWriter writer(folder.file("c"), three, {});
    writer.write("1234", 4);
    writer.commit();
    CHECK(false);
  } catch (const std::logic_error&) {
  }
  CHECK_EQUAL(listing(folder.path).size(), 1U);
  CHECK_EQUAL(contents(folder.file("c")), "before");
}

TEST(a_failed_write_leaves_no_file) {
  const Folder folder;
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit small{4096, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  std::string message;
  try {
    TensorWriter writer(folder.file("c"), {{"a", "U8", {1 << 20}, 0, 0}}, {});
    const std::string bytes(1 << 20, 'x');
    writer.write(bytes.data(), bytes.size());
    writer.commit();
  } catch (const Failure& failure) {
    message = failure.failed;
    CHECK(failure.code == Code::cannot_run_here);
  }
  setrlimit(RLIMIT_FSIZE, &before);
  CHECK_EQUAL(message, folder.file("c") + " cannot be written: File too large");
  CHECK(listing(folder.path).empty());
  CHECK_THROWS_WITH(TensorWriter(folder.file("no/c"), {}, {}), "write to a folder that exists");
}

TEST(a_full_disk_leaves_no_file) {
  const Folder folder(check::given("KVEXPORT_TEST_FULL_DISK"));
  try {
    TensorWriter writer(folder.file("c"), {{"a", "U8", {8 << 20}, 0, 0}}, {});
    const std::string bytes(8 << 20, 'x');
    writer.write(bytes.data(), bytes.size());
    writer.commit();
    CHECK(false);
  } catch (const Failure& failure) {
    CHECK_EQUAL(failure.failed, folder.file("c") + " cannot be written: No space left on device");
    CHECK_EQUAL(failure.fix, "free disk space, or write to another disk");
  }
  CHECK(listing(folder.path).empty());
}

TEST(writes_a_file_for_python) { write_three(check::given("KVEXPORT_TEST_WRITE")); }
