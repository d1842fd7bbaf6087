// SHA-256 by OpenSSL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

struct evp_md_ctx_st;

namespace kvexport::detail {

class Sha256 {
 public:
  Sha256();  // throws Failure (cannot_run_here) if libcrypto does not provide SHA-256
  void update(const void* data, std::size_t bytes);
  std::string hex();  // 64 hexadecimal digits; may be called once

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
};

std::string sha256_of(std::string_view bytes);

// Hash of a file from byte `from` on, read in pieces. Throws Failure (usage) if it cannot be read.
std::string sha256_of_file(const std::string& path, std::uint64_t from = 0);

}  // namespace kvexport::detail
