#include "bundle/sha256.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <vector>

#include "bundle/error.hpp"
#include "bundle/file.hpp"

namespace kvexport::detail {

namespace {

void require(int status) {
  if (status != 1) throw Failure(Code::cannot_run_here, "OpenSSL's libcrypto must provide SHA-256");
}

}  // namespace

void Sha256::Free::operator()(evp_md_ctx_st* context) const { EVP_MD_CTX_free(context); }

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  require(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
}

void Sha256::update(const void* data, std::size_t bytes) {
  require(EVP_DigestUpdate(context_.get(), data, bytes));
}

std::string Sha256::hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  require(EVP_DigestFinal_ex(context_.get(), digest, &size));
  static const char digits[] = "0123456789abcdef";
  std::string digits_of_hash;
  for (unsigned int i = 0; i < size; ++i) {
    digits_of_hash += digits[digest[i] >> 4];
    digits_of_hash += digits[digest[i] & 15];
  }
  return digits_of_hash;
}

std::string sha256_of(std::string_view bytes) {
  Sha256 digest;
  digest.update(bytes.data(), bytes.size());
  return digest.hex();
}

std::string sha256_of_file(const std::string& path, std::uint64_t from) {
  const File file(path);
  Sha256 digest;
  std::vector<char> piece(std::size_t{1} << 22);
  for (std::uint64_t at = from; at < file.size();) {
    const auto bytes = static_cast<std::size_t>(std::min<std::uint64_t>(piece.size(), file.size() - at));
    file.read(piece.data(), bytes, at);
    digest.update(piece.data(), bytes);
    at += bytes;
  }
  return digest.hex();
}

}  // namespace kvexport::detail
