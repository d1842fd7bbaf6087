// Reading and writing of files. Reads are bounded by an expected size; a new file appears only when it is
// complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace kvexport::detail {

// A file open for reading. The constructor throws Failure (usage) with the system's reason if it is not a
// regular file or cannot be read.
class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::uint64_t size() const { return size_; }
  // Reads exactly `bytes` bytes from `offset` on. Throws Failure if the file ends earlier.
  void read(void* target, std::size_t bytes, std::uint64_t offset) const;

 private:
  std::string path_;
  int descriptor_;
  std::uint64_t size_ = 0;
};

// Size in bytes of a regular file (links are followed); nothing if there is none.
std::optional<std::uint64_t> size_of_file(const std::string& path);

// Reads a whole file. Throws Failure (usage) if it is larger than `most` bytes or cannot be read.
std::string read_file(const std::string& path, std::size_t most);

// A temporary file beside `path`. `commit` renames it to `path`; without `commit` it is removed. Every call
// throws Failure with the system's reason, e.g. a full disk.
class NewFile {
 public:
  explicit NewFile(const std::string& path);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const void* data, std::size_t bytes);
  // Replaces bytes that were written before.
  void overwrite(const void* data, std::size_t bytes, std::uint64_t offset);
  void commit();

 private:
  void require_below_size_limit(std::size_t bytes) const;
  [[noreturn]] void fail(const char* doing) const;
  std::string path_, temporary_;
  int descriptor_ = -1;
};

}  // namespace kvexport::detail
