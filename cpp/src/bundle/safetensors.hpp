// Files in the safetensors format. Reading checks the whole header before it allocates memory for tensors;
// writing streams the data. The metadata key "sha256" holds the hash of the data section.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "bundle/file.hpp"
#include "bundle/sha256.hpp"

namespace kvexport::detail {

struct TensorEntry {
  std::string name, dtype;  // dtype by its name in the format: "F32", "F16", "BF16", "I64", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // byte range in the data section

  std::uint64_t bytes() const { return end - begin; }
};

using Metadata = std::map<std::string, std::string>;

struct TensorHeader {
  Metadata metadata;
  std::vector<TensorEntry> tensors;  // in the order of their data
  std::uint64_t data = 0;            // offset of the data section in the file

  const TensorEntry* find(const std::string& name) const;  // nullptr if there is none
};

// Parses the header. `start`: the first bytes of the file, at least as many as `header_bytes` returns;
// `file_size`: size of the whole file; `where`: path for messages. Throws Failure (usage) if the header is
// truncated, too long or not JSON, a dtype is unknown, an entry has an unknown key, a shape does not match
// its number of bytes, or the tensors overlap, leave gaps, or do not end at the end of the file.
TensorHeader parse_header(std::string_view start, std::uint64_t file_size, const std::string& where);

// Number of bytes of the length prefix and the header, from the first 8 bytes of the file. Throws Failure as
// parse_header does.
std::uint64_t header_bytes(std::string_view start, std::uint64_t file_size, const std::string& where);

class TensorReader {
 public:
  explicit TensorReader(const std::string& path);  // reads and checks the header only

  const TensorHeader& header() const { return header_; }
  void verify() const;  // Checks the hash of the data. Throws Failure if it differs from the metadata's
                        // sha256 or there is none.
  // Reads `bytes` bytes of a tensor's data from byte `offset` on; the range must lie within the tensor.
  void read(const TensorEntry& tensor, void* target, std::size_t bytes, std::uint64_t offset = 0) const;

 private:
  std::string path_;
  File file_;
  TensorHeader header_;
};

// Writes a file. `tensors`: names, dtypes and shapes; the data follows in this order, in pieces of any size.
// The file appears at `path` when `commit` is called. Every call throws Failure (cannot_run_here) if writing
// fails, e.g. on a full disk.
class TensorWriter {
 public:
  TensorWriter(const std::string& path, std::vector<TensorEntry> tensors, Metadata metadata);

  void write(const void* data, std::size_t bytes);
  void commit();

 private:
  NewFile file_;
  Sha256 digest_;
  std::uint64_t digest_at_ = 0, left_ = 0;
};

}  // namespace kvexport::detail
