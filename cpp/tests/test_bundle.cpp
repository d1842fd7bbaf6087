// Bundles on disk: sizes, hashes, and messages for directories that are not bundles.
#include <sys/stat.h>
#include <unistd.h>

#include "bundle/bundle.hpp"
#include "bundle/error.hpp"
#include "bundle/sha256.hpp"
#include "check.hpp"
#include "files.hpp"

using namespace kvexport::detail;

namespace {

// A copy that a test may damage.
class Copy : public Folder {
 public:
  Copy() {
    std::filesystem::copy(check::reader_file("tiny"), path, std::filesystem::copy_options::recursive);
  }
};

}  // namespace

TEST(opens_and_verifies) {
  const Bundle bundle = Bundle::open(check::reader_file("tiny"));
  CHECK_EQUAL(bundle.manifest.layers.size(), 2U);
  CHECK_EQUAL(bundle.file("a"), check::reader_file("tiny") + "/a");
  bundle.verify_all(true);
  bundle.verify({});
  CHECK_THROWS_WITH(bundle.verify({"other"}), "must list other");
}

TEST(a_changed_bit_is_reported_with_the_file_name) {
  const Copy copy;
  for (const std::string name : {"decoder.onnx", "decoder.onnx.data", "tokenizer.json"}) {
    const std::string whole = contents(copy.file(name));
    std::string spoiled = whole;
    spoiled[spoiled.size() / 2] ^= 4;
    write(copy.file(name), spoiled);
    const Bundle bundle = Bundle::open(copy.path);  // the size is unchanged
    CHECK_THROWS_WITH(bundle.verify_all(true),
                      name + " of the bundle " + copy.path + " must be unchanged since it was written");
    if (name == data_file) bundle.verify_all(false);
    write(copy.file(name), whole);
    bundle.verify_all(true);
  }
}

TEST(missing_truncated_and_extended_files_are_reported) {
  const Copy copy;
  for (const std::string name : {"decoder.onnx", "decoder.onnx.data", "tokenizer.json"}) {
    const std::string whole = contents(copy.file(name));
    for (const std::string& content : {whole.substr(1), std::string(), whole + "x"}) {
      write(copy.file(name), content);
      CHECK_THROWS_WITH(Bundle::open(copy.path),
                        name + " of the bundle " + copy.path + " must have the size in the manifest");
    }
    std::filesystem::remove(copy.file(name));
    CHECK_THROWS_WITH(Bundle::open(copy.path), "must contain " + name);
    std::filesystem::create_directory(copy.file(name));
    CHECK_THROWS_WITH(Bundle::open(copy.path), "must contain " + name);
    std::filesystem::remove(copy.file(name));
    write(copy.file(name), whole);
  }
  Bundle::open(copy.path);
}

TEST(directories_that_are_not_bundles_get_a_fix) {
  const Folder folder;
  CHECK_THROWS_WITH(Bundle::open(folder.path), "make one: kvexport build CHECKPOINT -o " + folder.path);
  CHECK_THROWS_WITH(Bundle::open("/nowhere"), "/nowhere must be a bundle: it has no manifest.json");
  write(folder.file("config.json"), "{}");
  CHECK_THROWS_WITH(Bundle::open(folder.path), "it is a checkpoint; make a bundle of it");
  write(folder.file("manifest.json"), std::string((1 << 24) + 1, ' '));
  CHECK_THROWS_WITH(Bundle::open(folder.path), "must be at most 16777216 bytes");
}

TEST(opens_read_only_moved_and_linked_bundles) {
  const Folder folder;
  std::filesystem::copy(check::reader_file("tiny"), folder.file("first"));
  std::filesystem::rename(folder.file("first"), folder.file("second one"));
  std::filesystem::create_directory_symlink("second one", folder.file("link"));
  ::chmod(folder.file("second one").c_str(), 0500);
  Bundle::open(folder.file("second one")).verify_all(true);
  Bundle::open(folder.file("link")).verify_all(true);
  ::chmod(folder.file("second one").c_str(), 0700);
}

TEST(reports_missing_read_permission) {
  if (::geteuid() == 0) throw check::Skipped{"root may read everything"};
  const Copy copy;
  ::chmod(copy.file("decoder.onnx").c_str(), 0);
  CHECK_THROWS_WITH(Bundle::open(copy.path).verify_all(true), "Permission denied");
}

TEST(sha256_matches_known_digests) {
  CHECK_EQUAL(sha256_of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK_EQUAL(sha256_of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const Folder folder;
  const std::string large((5 << 20) + 3, 'k');
  write(folder.file("large"), large);
  CHECK_EQUAL(sha256_of_file(folder.file("large")), sha256_of(large));
  CHECK_EQUAL(sha256_of_file(folder.file("large"), large.size() - 2), sha256_of("kk"));
}
