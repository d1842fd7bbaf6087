// A bundle's self-test file, self_test.json, as typed data: the reference outputs of the PyTorch model,
// recorded at build time. Same keys and ranges as kvexport/bundle/self_test_file.py.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bundle/bundle.hpp"
#include "bundle/manifest.hpp"

namespace kvexport::detail {

// Reference outputs of one token. Row r belongs to token r of the prompt and its continuation.
struct Row {
  double rms = 0;              // root mean square of its logits over the whole vocabulary
  std::int64_t likeliest = 0;  // the token with the largest logit
  double margin = 0;           // difference between the two largest logits
  std::vector<double> values;  // logits at ReferenceOutputs::logit_indices
  // L2 norms of the token's key and value in each layer, over all KV heads.
  std::vector<double> key_norms, value_norms;
};

// Largest deviation from the reference outputs that a correct runtime may have.
struct Tolerance {
  double logits = 0;  // error of a logit and of the rms, in units of the row's rms
  double norms = 0;   // |norm / reference norm - 1| of a key or value
  double tie = 0;     // margin / rms below which another token may be the most likely one
};

struct ReferenceOutputs {
  std::string weights_sha256;         // of decoder.onnx.data at build time
  std::optional<std::int64_t> slots;  // slots of evicting layers in this test; none if no layer evicts
  std::vector<std::int64_t> tokens;   // the prompt, then the reference's greedy continuation
  std::int64_t prompt = 0;            // number of prompt tokens, at least 1
  std::int64_t first_row = 0;         // token of rows[0], within the prompt; rows end with the last token
  std::vector<std::int64_t> logit_indices;
  std::vector<Row> rows;
  // By provider ("cpu", "cuda", "tensorrt") and Dtype.
  std::map<std::string, std::array<Tolerance, 3>> tolerances;

  const Tolerance& tolerance(const std::string& provider, Dtype dtype) const {
    return tolerances.at(provider)[static_cast<std::size_t>(dtype)];
  }
};

// Parses the content of the file. `path`: its name in messages. Throws Failure if a key is missing or has
// another type or range, or if the file contradicts the manifest.
ReferenceOutputs parse_reference_outputs(std::string_view text, const Manifest& manifest,
                                         const std::string& path);

// Reads the file of a bundle. Throws Failure if the bundle has none, and as parse_reference_outputs does.
ReferenceOutputs read_reference_outputs(const Bundle& bundle);

}  // namespace kvexport::detail
