// The bundle: a directory with a manifest and the files that the manifest lists. Checks that the files exist,
// their sizes and their hashes. The manifest itself is parsed in manifest.hpp. Nothing in a bundle is
// executed, and nothing is written to it.
#pragma once

#include <string>
#include <vector>

#include "bundle/manifest.hpp"

namespace kvexport::detail {

inline constexpr const char* manifest_file = "manifest.json";
inline constexpr const char* graph_file = "decoder.onnx";
inline constexpr const char* data_file = "decoder.onnx.data";  // the weights

class Bundle {
 public:
  // Opens a bundle: reads and checks the manifest, and checks that every listed file exists and has the
  // listed size. Hashes no file (see `verify`). Throws Failure if there is no bundle, its format is not
  // supported, the manifest is damaged, or a file is missing or has a different size.
  static Bundle open(const std::string& path);

  std::string path;
  Manifest manifest;

  // Absolute path of a file of the bundle; it stays valid if the process changes its current directory.
  std::string file(const std::string& name) const { return folder_ + "/" + name; }

  // Hashes the named files. Throws Failure for the first one that the manifest does not list or whose hash
  // differs.
  void verify(const std::vector<std::string>& names) const;
  // Hashes every file. `weights`: include decoder.onnx.data, the largest one.
  void verify_all(bool weights) const;

 private:
  std::string folder_;
};

}  // namespace kvexport::detail
