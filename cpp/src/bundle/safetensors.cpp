#include "bundle/safetensors.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "bundle/error.hpp"
#include "bundle/json.hpp"

namespace kvexport::detail {

namespace {

constexpr std::uint64_t prefix = 8;  // the length of the header, 8 bytes little-endian
constexpr std::uint64_t largest_header = std::uint64_t{1} << 24;
constexpr std::size_t digest_digits = 64;
constexpr const char* metadata_key = "__metadata__";
constexpr std::pair<const char*, std::uint64_t> dtypes[] = {
    {"F64", 8},  {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2},
    {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};

Failure damaged(const std::string& where, const std::string& problem, const std::string& got = {},
                const std::string& expected = {}) {
  return {Code::usage, where + " must be a valid safetensors file: " + problem, got, expected,
          "write it again"};
}

std::uint64_t little_endian(std::string_view bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = prefix; i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value;
}

// Size of a tensor's data in bytes. Throws Failure if the dtype is unknown or the size overflows.
std::uint64_t bytes_of(const TensorEntry& tensor, const std::string& where) {
  const auto known = std::find_if(std::begin(dtypes), std::end(dtypes),
                                  [&](const auto& each) { return each.first == tensor.dtype; });
  if (known == std::end(dtypes))
    throw damaged(where, "the dtype of " + for_message(tensor.name) + " is not supported",
                  for_message(tensor.dtype));
  std::uint64_t bytes = known->second;
  for (const std::int64_t size : tensor.shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes))
      throw damaged(where, "the shape of " + for_message(tensor.name) + " is not valid",
                    std::to_string(size));
  }
  return bytes;
}

TensorEntry entry_of(const std::string& name, const Table& table, const std::string& where) {
  table.only({"data_offsets", "dtype", "shape"});
  TensorEntry tensor{name, table.text("dtype"), table.integers("shape"), 0, 0};
  const std::vector<std::int64_t> offsets = table.integers("data_offsets", 0);
  if (offsets.size() != 2 || offsets[1] < offsets[0])
    table.fail("data_offsets", "the start and the end of the data");
  tensor.begin = static_cast<std::uint64_t>(offsets[0]), tensor.end = static_cast<std::uint64_t>(offsets[1]);
  const std::uint64_t bytes = bytes_of(tensor, where);
  if (bytes != tensor.bytes()) {
    throw damaged(where, "the shape of " + for_message(name) + " does not match the size of its data",
                  std::to_string(tensor.bytes()) + " bytes", std::to_string(bytes) + " bytes");
  }
  return tensor;
}

}  // namespace

const TensorEntry* TensorHeader::find(const std::string& name) const {
  const auto match = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const TensorEntry& each) { return each.name == name; });
  return match == tensors.end() ? nullptr : &*match;
}

std::uint64_t header_bytes(std::string_view start, std::uint64_t file_size, const std::string& where) {
  if (file_size < prefix || start.size() < prefix)
    throw damaged(where, "it is too short", std::to_string(file_size) + " bytes");
  const std::uint64_t length = little_endian(start);
  if (length > largest_header || length > file_size - prefix) {
    throw damaged(where, "its header is too long", std::to_string(length) + " bytes",
                  "at most " + std::to_string(std::min(largest_header, file_size - prefix)) + " bytes");
  }
  return prefix + length;
}

TensorHeader parse_header(std::string_view start, std::uint64_t file_size, const std::string& where) {
  TensorHeader header;
  header.data = header_bytes(start, file_size, where);
  if (start.size() < header.data) throw damaged(where, "its header is truncated");
  const Json raw =
      parse_json(start.substr(prefix, header.data - prefix), "the header of " + where, "write it again");
  const Table table(raw, "the header of " + where, "write it again");
  for (const std::string& name : table.keys()) {
    const Table entry = table.table(name);
    if (name != metadata_key) {
      header.tensors.push_back(entry_of(name, entry, where));
      continue;
    }
    for (const std::string& key : entry.keys()) header.metadata[key] = entry.text(key);
  }
  std::sort(header.tensors.begin(), header.tensors.end(), [](const auto& left, const auto& right) {
    return std::pair(left.begin, left.end) < std::pair(right.begin, right.end);
  });
  std::uint64_t end = 0;
  for (const TensorEntry& tensor : header.tensors) {
    if (tensor.begin != end)
      throw damaged(where, "its tensors overlap or leave a gap, at " + for_message(tensor.name));
    end = tensor.end;
  }
  if (end != file_size - header.data) {
    throw damaged(where, "the size of its data differs from its header",
                  std::to_string(file_size - header.data) + " bytes", std::to_string(end) + " bytes");
  }
  return header;
}

TensorReader::TensorReader(const std::string& path) : path_(path), file_(path) {
  std::string start(static_cast<std::size_t>(std::min(prefix, file_.size())), '\0');
  file_.read(start.data(), start.size(), 0);
  start.resize(static_cast<std::size_t>(header_bytes(start, file_.size(), path)));
  file_.read(start.data(), start.size(), 0);
  header_ = parse_header(start, file_.size(), path);
}

void TensorReader::verify() const {
  const auto digest = header_.metadata.find("sha256");
  if (digest == header_.metadata.end() || digest->second != sha256_of_file(path_, header_.data))
    throw damaged(path_, "its data was changed: its sha256 differs");
}

void TensorReader::read(const TensorEntry& tensor, void* target, std::size_t bytes,
                        std::uint64_t offset) const {
  file_.read(target, bytes, header_.data + tensor.begin + offset);
}

TensorWriter::TensorWriter(const std::string& path, std::vector<TensorEntry> tensors, Metadata metadata)
    : file_(path) {
  metadata["sha256"] = std::string(digest_digits, '0');  // a placeholder that `commit` overwrites
  nlohmann::ordered_json header;
  header[metadata_key] = metadata;
  for (TensorEntry& tensor : tensors) {
    tensor.begin = left_;
    left_ += bytes_of(tensor, path);
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {tensor.begin, left_}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + prefix - 1) / prefix * prefix, ' ');
  const std::string key = "\"sha256\":\"" + metadata["sha256"];
  digest_at_ = prefix + text.find(key) + key.size() - digest_digits;
  std::string length(prefix, '\0');
  for (std::size_t i = 0; i < prefix; ++i) length[i] = static_cast<char>(text.size() >> (8 * i) & 0xFF);
  file_.write(length.data(), length.size());
  file_.write(text.data(), text.size());
}

void TensorWriter::write(const void* data, std::size_t bytes) {
  if (bytes > left_) throw std::logic_error("more data than tensors");
  digest_.update(data, bytes);
  file_.write(data, bytes);
  left_ -= bytes;
}

void TensorWriter::commit() {
  if (left_ != 0) throw std::logic_error("tensors without data");
  const std::string digest = digest_.hex();
  file_.overwrite(digest.data(), digest.size(), digest_at_);
  file_.commit();
}

}  // namespace kvexport::detail
