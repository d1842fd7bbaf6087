#include "bundle/bundle.hpp"

#include <filesystem>
#include <system_error>

#include "bundle/error.hpp"
#include "bundle/file.hpp"
#include "bundle/sha256.hpp"

namespace kvexport::detail {

namespace {

constexpr std::size_t largest_manifest = std::size_t{1} << 24;
constexpr const char* copy_again =
    "copy the bundle again, or build the bundle again: kvexport build CHECKPOINT -o BUNDLE";

std::string read_manifest(const std::string& path) {
  const std::string file = path + "/" + manifest_file;
  if (!size_of_file(file)) {
    std::string fix = "make one: kvexport build CHECKPOINT -o " + path;
    if (size_of_file(path)) fix = "name its folder: " + std::filesystem::path(path).parent_path().string();
    if (size_of_file(path + "/config.json"))
      fix = "it is a checkpoint; make a bundle of it: kvexport build " + path + " -o BUNDLE";
    throw bundle_error(path + " must be a bundle: it has no " + manifest_file, {}, {}, fix);
  }
  return read_file(file, largest_manifest);
}

}  // namespace

Bundle Bundle::open(const std::string& path) {
  Bundle bundle;
  bundle.path = path;
  std::error_code error;  // set if the current directory was deleted; the given path is then used as it is
  bundle.folder_ = std::filesystem::absolute(path, error).string();
  if (error) bundle.folder_ = path;
  bundle.manifest = parse_manifest(read_manifest(path), path);
  for (const auto& [name, entry] : bundle.manifest.files) {
    const auto size = size_of_file(bundle.file(name));
    if (!size) throw bundle_error("the bundle " + path + " must contain " + name, {}, {}, copy_again);
    if (*size != entry.bytes) {
      throw bundle_error(name + " of the bundle " + path + " must have the size in the manifest",
                         std::to_string(*size) + " bytes", std::to_string(entry.bytes) + " bytes",
                         copy_again);
    }
  }
  return bundle;
}

void Bundle::verify(const std::vector<std::string>& names) const {
  for (const std::string& name : names) {
    const auto listed = manifest.files.find(name);
    if (listed == manifest.files.end())
      throw bundle_error("the manifest of the bundle " + path + " must list " + name);
    if (sha256_of_file(file(name)) != listed->second.sha256) {
      throw bundle_error(
          name + " of the bundle " + path + " must be unchanged since it was written: its sha256 differs", {},
          {}, copy_again);
    }
  }
}

void Bundle::verify_all(bool weights) const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : manifest.files) {
    if (weights || name != data_file) names.push_back(name);
  }
  verify(names);
}

}  // namespace kvexport::detail
