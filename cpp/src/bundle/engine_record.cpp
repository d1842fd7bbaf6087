#include "bundle/engine_record.hpp"

#include <dirent.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "bundle/error.hpp"
#include "bundle/file.hpp"
#include "bundle/json.hpp"
#include "bundle/sha256.hpp"

namespace kvexport::detail {

namespace {

constexpr std::int64_t format = 1;
constexpr std::size_t largest = std::size_t{1} << 20;
constexpr const char* engines_folder = "engines";
constexpr const char* plan_file = "decoder.plan";
constexpr const char* record_file = "build.json";
constexpr const char* rebuild = "build the engine again: kvexport engine BUNDLE --force";

std::uint64_t size(const Reader& reader, const std::string& key, std::int64_t minimum = 0) {
  const std::int64_t value = reader.integer(key);
  if (value < minimum) reader.fail(key, "is impossible", std::to_string(minimum) + " or more");
  return static_cast<std::uint64_t>(value);
}

Profile profile_of(const Reader& reader) {
  const std::vector<std::int64_t> sequence = reader.integers("sequence");
  if (sequence.size() != 3 || sequence[0] < 1 || sequence[1] < sequence[0] || sequence[2] < sequence[1])
    reader.fail("sequence", "is impossible", "least, typical and most, from 1 on");
  return {reader.printable_string("name"), sequence[0], sequence[1], sequence[2]};
}

bool option(const Reader& options, const std::string& key) {
  return options.has(key) && options.boolean(key);
}

}  // namespace

void BuildRecord::verify() const {
  if (sha256_of_file(plan) == plan_sha256) return;
  throw bundle_error(plan + " is not as it was built: its sha256 differs", {}, {},
                     "build it again: kvexport engine BUNDLE --target " + target + " --force");
}

std::vector<std::string> engine_directories(const Bundle& bundle) {
  const std::string folder = bundle.file(engines_folder);
  std::vector<std::string> directories;
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(::opendir(folder.c_str()), ::closedir);
  while (const dirent* entry = listing ? ::readdir(listing.get()) : nullptr) {
    const std::string directory = folder + "/" + entry->d_name;
    if (entry->d_name[0] != '.' && size_of_file(directory + "/" + record_file))
      directories.push_back(directory);
  }
  std::sort(directories.begin(), directories.end());
  return directories;
}

BuildRecord parse_record(std::string_view text, const std::string& directory) {
  const std::string document = std::string(record_file) + " of the engine " + directory;
  const Json raw = parse_json(text, document, rebuild);
  const Reader reader(raw, document, "", rebuild);
  if (!reader.has("format") || !raw["format"].is_number_integer() || raw["format"] != format) {
    throw bundle_error("the engine " + directory + " is of another format",
                       "format " + for_message(raw.value("format", Json())) + ", written by kvexport " +
                           for_message(raw.value("kvexport", Json())),
                       "format " + std::to_string(format), rebuild);
  }
  BuildRecord record;
  record.directory = directory;
  record.plan = directory + "/" + plan_file;
  record.kvexport = reader.printable_string("kvexport");
  record.manifest_sha256 = reader.printable_string("manifest_sha256");
  record.target = reader.printable_string("target");
  record.engine = reader.printable_string("engine");
  if (record.engine != "tensorrt" && record.engine != "tensorrt-rtx")
    reader.fail("engine", "is not known", "tensorrt, tensorrt-rtx");
  record.version = reader.printable_string("version");
  record.lowering = reader.printable_string("lowering");
  record.dtype = reader.printable_string("dtype");
  record.compute_capability = reader.strings("compute_capability");
  reader.strings("decomposed");
  record.batch = reader.positive_integer("batch");
  record.capacity = reader.positive_integer("capacity");
  record.chunk = reader.positive_integer("chunk");
  for (const Reader& profile : reader.objects("profiles")) record.profiles.push_back(profile_of(profile));
  if (record.profiles.empty()) reader.fail("profiles", "is empty");
  const Reader options = reader.object("options"), plan = reader.object("plan");
  record.refit = option(options, "refit");
  record.version_compatible = option(options, "version_compatible");
  record.hardware_compatible = option(options, "hardware_compatible");
  record.plan_sha256 = plan.printable_string("sha256");
  record.plan_bytes = size(plan, "bytes");
  record.weights_bytes = size(reader, "weights_bytes");
  if (reader.has("activation_bytes")) record.activation_bytes = size(reader, "activation_bytes");
  for (const char* key : {"timing_cache_bytes", "peak_host_bytes"}) size(reader, key);
  if (reader.number("seconds") < 0) reader.fail("seconds", "is impossible", "0 or more");
  const Reader layers = reader.object("layers");
  for (const std::string& kind : layers.keys()) layers.integer(kind);
  return record;
}

BuildRecord read_record(const std::string& directory) {
  const std::string file = directory + "/" + record_file;
  if (!size_of_file(file))
    throw bundle_error("there is no engine in " + directory, {}, {}, "build one: kvexport engine BUNDLE");
  BuildRecord record = parse_record(read_file(file, largest), directory);
  const auto size = size_of_file(record.plan);
  if (size != record.plan_bytes) {
    throw bundle_error(std::string(plan_file) + " of the engine " + directory + " is not as built",
                       size ? std::to_string(*size) + " bytes" : "no such file",
                       std::to_string(record.plan_bytes) + " bytes", rebuild);
  }
  return record;
}

}  // namespace kvexport::detail
