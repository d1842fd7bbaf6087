// Files of named tensors in the safetensors format: read with everything checked before anything is
// allocated, written as a stream. Knows types, shapes and offsets, not what the tensors are. The sha256 of
// the data is in the metadata, as "sha256".
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
  std::string name, dtype;  // dtype as the format calls it: "F32", "F16", "BF16", "I64", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // bytes in the data section

  std::uint64_t bytes() const { return end - begin; }
};

using Metadata = std::map<std::string, std::string>;

struct TensorHeader {
  Metadata metadata;
  std::vector<TensorEntry> tensors;  // in the order of their data
  std::uint64_t data = 0;            // where in the file the data section begins

  const TensorEntry* find(const std::string& name) const;  // nullptr: not there
};

// `start`: the file's first bytes, with the whole header (see `header_bytes`); `file_size`: of the file.
// `where`: for messages. Throws Failure (usage): a header that is cut off, too long or no JSON; an unknown
// dtype; a shape that is not its bytes; tensors that overlap, leave holes, or do not end where the file does.
TensorHeader parse_header(std::string_view start, std::uint64_t file_size, const std::string& where);

// How many of the file's first bytes are the length and the header, from the first 8 of them; Failure as
// above.
std::uint64_t header_bytes(std::string_view start, std::uint64_t file_size, const std::string& where);

class TensorReader {
 public:
  explicit TensorReader(const std::string& path);  // reads and checks the header alone

  const TensorHeader& header() const { return header_; }
  void verify() const;  // Failure: the data is not what the metadata's sha256 says, or there is none
  // `bytes` of a tensor's data, from its byte `offset` on; both within it.
  void read(const TensorEntry& tensor, void* target, std::size_t bytes, std::uint64_t offset = 0) const;

 private:
  std::string path_;
  File file_;
  TensorHeader header_;
};

// `tensors`: names, dtypes and shapes; their data follows in that order, in pieces of any size. The file
// appears at `path` with `commit`, whole, and not at all without. Throws Failure (cannot_run_here), as of a
// full disk, from each.
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
