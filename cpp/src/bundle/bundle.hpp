// The bundle: a directory with a manifest and the files that it lists. Knows which files there are, their
// sizes and hashes; what the manifest says is in manifest.hpp, what is in the files is others' matter.
// Executes nothing, writes nothing.
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
  // The manifest is read and checked, and every file is there in its size; none is hashed (see `verify`).
  // Throws Failure: no bundle, another format, a damaged manifest, a file missing or of another size.
  static Bundle open(const std::string& path);

  std::string path;
  Manifest manifest;

  // Where a file is, whatever folder the process changes to.
  std::string file(const std::string& name) const { return folder_ + "/" + name; }

  // Hash the named files. Throws Failure that names the first that is not listed, or not as it was written.
  void verify(const std::vector<std::string>& names) const;
  // All of them; `weights`: the largest, decoder.onnx.data, too.
  void verify_all(bool weights) const;

 private:
  std::string folder_;
};

}  // namespace kvexport::detail
