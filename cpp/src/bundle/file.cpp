#include "bundle/file.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>

#include "bundle/error.hpp"

namespace kvexport::detail {

namespace {

// The fix depends on the reason.
Failure cannot_read(const std::string& path, int reason) {
  std::string fix;
  if (reason == EACCES || reason == EPERM) fix = "make it readable: chmod a+r " + path;
  return {Code::usage, path + " cannot be read: " + std::strerror(reason), {}, {}, std::move(fix)};
}

}  // namespace

File::File(const std::string& path)
    : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) throw cannot_read(path, errno);
  struct stat status{};
  const int reason = ::fstat(descriptor_, &status) != 0 ? errno : S_ISDIR(status.st_mode) ? EISDIR : 0;
  if (reason != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    if (reason != 0) throw cannot_read(path, reason);
    throw Failure(Code::usage, path + " must be a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

File::~File() { ::close(descriptor_); }

void File::read(void* target, std::size_t bytes, std::uint64_t offset) const {
  char* at = static_cast<char*>(target);
  while (bytes != 0) {
    const ssize_t count = ::pread(descriptor_, at, bytes, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw cannot_read(path_, errno);
    if (count == 0)
      throw Failure(Code::usage, path_ + " was truncated while it was read: it is shorter than " +
                                     std::to_string(offset + bytes) + " bytes");
    at += count, bytes -= static_cast<std::size_t>(count), offset += static_cast<std::uint64_t>(count);
  }
}

std::optional<std::uint64_t> size_of_file(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
  return static_cast<std::uint64_t>(status.st_size);
}

std::string read_file(const std::string& path, std::size_t most) {
  const File file(path);
  if (file.size() > most) {
    throw Failure(Code::usage, path + " must be at most " + std::to_string(most) + " bytes",
                  std::to_string(file.size()) + " bytes", "at most " + std::to_string(most) + " bytes");
  }
  std::string content(static_cast<std::size_t>(file.size()), '\0');
  file.read(content.data(), content.size(), 0);
  return content;
}

NewFile::NewFile(const std::string& path) : path_(path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) {
    throw Failure(Code::usage, path + " must be a file, not a folder", {}, {}, "name a file in it");
  }
  // mkstemp would create a file that only its owner may read; this one gets the user's default permissions.
  std::random_device random;
  do {
    temporary_ = path + "." + std::to_string(random()) + ".partial";
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (descriptor_ < 0 && errno == EEXIST);
  if (descriptor_ < 0) fail("created");
}

NewFile::~NewFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void NewFile::write(const void* data, std::size_t bytes) {
  const char* at = static_cast<const char*>(data);
  require_below_size_limit(bytes);
  while (bytes != 0) {
    const ssize_t written = ::write(descriptor_, at, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("written");
    at += written, bytes -= static_cast<std::size_t>(written);
  }
}

void NewFile::overwrite(const void* data, std::size_t bytes, std::uint64_t offset) {
  const char* at = static_cast<const char*>(data);
  while (bytes != 0) {
    const ssize_t written = ::pwrite(descriptor_, at, bytes, static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("written");
    at += written, bytes -= static_cast<std::size_t>(written), offset += static_cast<std::uint64_t>(written);
  }
}

// Checks the process's file size limit first: a write beyond it would end the process with SIGXFSZ.
void NewFile::require_below_size_limit(std::size_t bytes) const {
  struct rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
  const off_t written = ::lseek(descriptor_, 0, SEEK_CUR);
  if (written >= 0 && static_cast<rlim_t>(written) + bytes <= limit.rlim_cur) return;
  errno = EFBIG;
  fail("written");
}

void NewFile::commit() {
  if (::fsync(descriptor_) != 0) fail("written");
  const int closed = ::close(descriptor_);
  const int reason = errno;
  descriptor_ = -1;
  if (closed != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = closed != 0 ? reason : errno;
    ::unlink(temporary_.c_str());
    errno = error;
    fail("written");
  }
}

void NewFile::fail(const char* doing) const {
  const int reason = errno;
  std::string fix;
  if (reason == ENOSPC || reason == EDQUOT) fix = "free disk space, or write to another disk";
  if (reason == EFBIG) fix = "allow larger files: ulimit -f unlimited";
  if (reason == EACCES || reason == EPERM || reason == EROFS || reason == ENOENT || reason == ENOTDIR)
    fix = "write to a folder that exists and is writable";
  const Code code = reason == ENOENT || reason == ENOTDIR ? Code::usage : Code::cannot_run_here;
  throw Failure(code, path_ + " cannot be " + doing + ": " + std::strerror(reason), {}, {}, std::move(fix));
}

}  // namespace kvexport::detail
