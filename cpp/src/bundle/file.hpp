// Files as this library reads and writes them: whole, or in ranges; no larger than expected; new ones appear
// whole or not at all. Knows nothing of what is in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace kvexport::detail {

// A file opened for reading. Throws Failure (usage) with the system's reason where it is none or cannot be
// read.
class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::uint64_t size() const { return size_; }
  // All of `bytes`, from `offset` on; Failure where the file ends before.
  void read(void* target, std::size_t bytes, std::uint64_t offset) const;

 private:
  std::string path_;
  int descriptor_;
  std::uint64_t size_ = 0;
};

// Size of a plain file (links are followed), or nothing where there is none.
std::optional<std::uint64_t> size_of_file(const std::string& path);

// The whole file, of at most `most` bytes.
std::string read_file(const std::string& path, std::size_t most);

// A temporary sibling of `path` that `commit` renames to it, and that is removed without. Throws Failure
// (cannot_run_here) with the system's reason, such as a full disk.
class NewFile {
 public:
  explicit NewFile(const std::string& path);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const void* data, std::size_t bytes);
  void overwrite(const void* data, std::size_t bytes,
                 std::uint64_t offset);  // bytes that were written before
  void commit();

 private:
  void require_allowed(std::size_t bytes) const;
  [[noreturn]] void refuse(const char* doing) const;
  std::string path_, temporary_;
  int descriptor_ = -1;
};

}  // namespace kvexport::detail
