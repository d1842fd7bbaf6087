// Engine records as kvexport/bundle/engine_record.py writes them.
#include <nlohmann/json.hpp>

#include "bundle/engine_record.hpp"
#include "bundle/error.hpp"
#include "bundle/json.hpp"
#include "check.hpp"
#include "files.hpp"

using namespace kvexport::detail;

namespace {

Json valid_record() { return Json::parse(contents(check::reader_file("engines.json"))); }

std::string with_change(const char* key, const Json& value) {
  Json raw = valid_record();
  raw[key] = value;
  return raw.dump();
}

}  // namespace

TEST(reads_records_of_python) {
  const BuildRecord record = parse_record(valid_record().dump(), "/b/engines/desk");
  CHECK_EQUAL(record.target, "desk");
  CHECK_EQUAL(record.engine, "tensorrt");
  CHECK_EQUAL(record.version, "10.16.1.11");
  CHECK_EQUAL(record.plan, "/b/engines/desk/decoder.plan");
  CHECK(record.compute_capability == (std::vector<std::string>{"8.7", "8.9"}));
  CHECK_EQUAL(record.capacity, 60);
  CHECK_EQUAL(record.profiles.size(), 2U);
  CHECK_EQUAL(record.profiles[1].maximum, 16);
  CHECK(record.refit && !record.version_compatible && record.hardware_compatible);
  CHECK_EQUAL(record.plan_bytes, 3U);
  CHECK(!record.activation_bytes);
}

TEST(refuses_missing_keys_and_wrong_types) {
  const Json whole = valid_record();
  for (const auto& [key, value] : whole.items()) {
    Json without = whole;
    without.erase(key);
    if (key == "activation_bytes" || key == "format") continue;
    CHECK_THROWS_WITH(parse_record(without.dump(), "e"), "build the engine again");
    CHECK_THROWS_WITH(parse_record(with_change(key.c_str(), Json::array({Json::array()})), "e"),
                      "build the engine again");
    CHECK_THROWS_WITH(parse_record(with_change(key.c_str(), -1), "e"), "build the engine again");
  }
}

TEST(refuses_invalid_values) {
  CHECK_THROWS_WITH(parse_record(with_change("format", 2), "e"),
                    "the format of the engine e must be supported");
  CHECK_THROWS_WITH(parse_record("{}", "e"), "the format of the engine e must be supported");
  CHECK_THROWS_WITH(parse_record("[]", "e"), "must be a table");
  CHECK_THROWS_WITH(parse_record("{", "e"), "build.json of the engine e must be JSON");
  CHECK_THROWS_WITH(parse_record(with_change("engine", "os"), "e"), "engine has an invalid value");
  CHECK_THROWS_WITH(parse_record(with_change("batch", 0), "e"), "batch has an invalid value");
  CHECK_THROWS_WITH(parse_record(with_change("profiles", Json::array()), "e"), "at least one profile");
  for (const Json& sequence : {Json{0, 1, 1}, Json{2, 1, 3}, Json{1, 2}, Json{1, 2, 1}}) {
    const Json profiles = Json::array({{{"name", "decode"}, {"sequence", sequence}}});
    CHECK_THROWS_WITH(parse_record(with_change("profiles", profiles), "e"), "sequence");
  }
}

TEST(lists_engines_by_name) {
  const Folder folder;
  std::filesystem::copy(check::reader_file("tiny"), folder.path);
  const Bundle bundle = Bundle::open(folder.path);
  CHECK(engine_directories(bundle).empty());
  for (const char* name : {"orin", "desk", "empty"})
    std::filesystem::create_directories(folder.file("engines/") + name);
  for (const char* name : {"orin", "desk"})
    write(folder.file("engines/") + name + "/build.json", valid_record().dump());
  CHECK(engine_directories(bundle) ==
        (std::vector<std::string>{folder.file("engines/desk"), folder.file("engines/orin")}));

  const std::string directory = folder.file("engines/desk");
  CHECK_THROWS_WITH(read_record(directory), "no such file");
  write(directory + "/decoder.plan", "four");
  CHECK_THROWS_WITH(read_record(directory),
                    "decoder.plan of the engine " + directory + " must have the size in build.json");
  write(directory + "/decoder.plan", "abc");
  read_record(directory).verify();
  write(directory + "/decoder.plan", "abd");
  CHECK_THROWS_WITH(read_record(directory).verify(), "its sha256 differs");
  CHECK_THROWS_WITH(read_record(folder.file("engines/empty")), "there is no engine in");
}
