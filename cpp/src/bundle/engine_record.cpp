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

std::uint64_t size(const Table& table, const std::string& key) {
  return static_cast<std::uint64_t>(table.integer(key, 0));
}

Profile profile_of(const Table& table) {
  const std::vector<std::int64_t> sequence = table.integers("sequence", 1);
  if (sequence.size() != 3 || !std::is_sorted(sequence.begin(), sequence.end()))
    table.fail("sequence", "minimum, typical and maximum, in ascending order");
  return {table.string("name"), sequence[0], sequence[1], sequence[2]};
}

bool option(const Table& options, const std::string& key) { return options.has(key) && options.boolean(key); }

}  // namespace

void BuildRecord::verify() const {
  if (sha256_of_file(plan) == plan_sha256) return;
  throw bundle_error(plan + " must be unchanged since it was built: its sha256 differs", {}, {},
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
  const std::string path = std::string(record_file) + " of the engine " + directory;
  const Json raw = parse_json(text, path, rebuild);
  const Table table(raw, path, rebuild);
  const Json& number = table.value("format");
  if (!number.is_number_integer() || number != format) {
    throw bundle_error(
        "the format of the engine " + directory + " must be supported by this version of kvexport",
        "format " + for_message(number) + ", written by kvexport " + for_message(table.value("kvexport")),
        "format " + std::to_string(format), rebuild);
  }
  const Table plan = table.table("plan"), layers = table.table("layers");
  BuildRecord record;
  record.directory = directory;
  record.plan = directory + "/" + plan_file;
  for (const Table& profile : table.tables("profiles")) record.profiles.push_back(profile_of(profile));
  if (record.profiles.empty()) table.fail("profiles", "at least one profile");
  record.kvexport = table.string("kvexport");
  record.manifest_sha256 = table.string("manifest_sha256");
  record.target = table.string("target");
  record.engine = table.string("engine", {"tensorrt", "tensorrt-rtx"});
  record.version = table.string("version");
  record.lowering = table.string("lowering");
  record.compute_capability = table.strings("compute_capability");
  record.dtype = table.string("dtype");
  record.batch = table.integer("batch", 1);
  record.capacity = table.integer("capacity", 1);
  record.chunk = table.integer("chunk", 1);
  table.strings("decomposed");
  const Table options = table.table("options");
  record.refit = option(options, "refit");
  record.version_compatible = option(options, "version_compatible");
  record.hardware_compatible = option(options, "hardware_compatible");
  record.plan_sha256 = plan.string("sha256");
  record.plan_bytes = size(plan, "bytes");
  for (const std::string& kind : layers.keys()) layers.integer(kind, 0);
  record.weights_bytes = size(table, "weights_bytes");
  if (!table.is_null("activation_bytes")) record.activation_bytes = size(table, "activation_bytes");
  for (const char* key : {"timing_cache_bytes", "peak_host_bytes"}) size(table, key);
  table.number("seconds", 0);
  return record;
}

BuildRecord read_record(const std::string& directory) {
  const std::string file = directory + "/" + record_file;
  if (!size_of_file(file))
    throw bundle_error("there is no engine in " + directory, {}, {}, "build one: kvexport engine BUNDLE");
  BuildRecord record = parse_record(read_file(file, largest), directory);
  const auto plan_size = size_of_file(record.plan);
  if (plan_size != record.plan_bytes) {
    throw bundle_error(
        std::string(plan_file) + " of the engine " + directory + " must have the size in " + record_file,
        plan_size ? std::to_string(*plan_size) + " bytes" : "no such file",
        std::to_string(record.plan_bytes) + " bytes", rebuild);
  }
  return record;
}

}  // namespace kvexport::detail
