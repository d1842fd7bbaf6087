// A bundle's reference vectors, self_test.json, as typed data: what its PyTorch twin computed when it was
// built. Knows the file's keys and ranges, as kvexport/bundle/self_test_file.py does; must not know how
// anything is held against them.
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

// What one token leaves: row r, after token r of prompt and continuation was fed.
struct Row {
  double rms = 0;              // root mean square of its logits over the whole vocabulary
  std::int64_t likeliest = 0;  // the token of the largest
  double margin = 0;           // by which that is larger than the second
  std::vector<double> values;  // logits of Vectors::logit_indices
  std::vector<double> key_norms,
      value_norms;  // of the token's key and value in each layer, all KV heads together
};

// How far a sound runtime may be from the twin.
struct Tolerance {
  double logits =
      0;  // largest error of a logit, and of the root mean square of all, in units of the row's rms
  double norms = 0;  // largest |norm / the twin's - 1| of a key or value
  double tie = 0;    // margin / rms below which another token may be the likeliest
};

struct ReferenceOutputs {
  std::string weights_sha256;         // of decoder.onnx.data as built
  std::optional<std::int64_t> slots;  // that layers which evict have in this test; none: no layer evicts
  std::vector<std::int64_t> tokens;   // the prompt, and what the twin chose after it, each the likeliest
  std::int64_t prompt = 0;            // how many of them are the prompt: 1 or more
  std::int64_t first_row =
      0;  // the row that `rows` begin with, one of the prompt's; they end with the last token's
  std::vector<std::int64_t> logit_indices;
  std::vector<Row> rows;
  std::map<std::string, std::array<Tolerance, 3>>
      tolerances;  // by provider ("cpu", "cuda", "tensorrt") and Dtype

  const Tolerance& tolerance(const std::string& provider, Dtype dtype) const {
    return tolerances.at(provider)[static_cast<std::size_t>(dtype)];
  }
};

// `document`: the file, for messages. Throws Failure: a key missing or of another type or range, or what
// contradicts the manifest.
ReferenceOutputs parse_reference_outputs(std::string_view text, const Manifest& manifest,
                                         const std::string& document);

// Those of a bundle. Throws Failure: it has none, or as parse_vectors does.
ReferenceOutputs read_reference_outputs(const Bundle& bundle);

}  // namespace kvexport::detail
