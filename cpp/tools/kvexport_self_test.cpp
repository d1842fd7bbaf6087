// Command-line self-test: checks that this machine computes the bundle's reference outputs.
//
//   kvexport_self_test BUNDLE [--provider NAME] [--json]
//
// Exit codes: 0 ok, 1 the outputs differ, 2 usage or damaged files, 3 this machine lacks what the test needs.
#include <kvexport/kvexport.h>

#include <cstdio>
#include <cstring>
#include <memory>

namespace {

using Error = std::unique_ptr<kvexport_error, void (*)(kvexport_error*)>;
using Session = std::unique_ptr<kvexport_session, void (*)(kvexport_session*)>;
using Text = std::unique_ptr<char, void (*)(char*)>;

int report_error(const Error& error) {
  std::fprintf(stderr, "kvexport_self_test: %s\n", kvexport_error_part(error.get(), KVEXPORT_MESSAGE));
  return kvexport_error_code(error.get());
}

int usage() {
  std::fputs(
      "usage: kvexport_self_test BUNDLE [--provider auto|cpu|cuda|tensorrt] [--json]\n"
      "Check that this machine computes the reference outputs of BUNDLE.\n"
      "  --provider  What runs the bundle [default: auto]\n"
      "  --json      Print the report as JSON\n",
      stderr);
  return KVEXPORT_USAGE;
}

}  // namespace

int main(int argc, char** argv) {
  const char* bundle = nullptr;
  bool json = false;
  kvexport_open_options options = kvexport_open_defaults();
  options.text_library = "";
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--json") == 0) {
      json = true;
    } else if (std::strcmp(argv[i], "--provider") == 0 && i + 1 < argc) {
      options.provider = argv[++i];
    } else if (bundle == nullptr && argv[i][0] != '-') {
      bundle = argv[i];
    } else {
      return usage();
    }
  }
  if (bundle == nullptr) return usage();

  kvexport_session* raw_session = nullptr;
  if (const Error error{kvexport_open(bundle, &options, &raw_session), kvexport_error_free}; error)
    return report_error(error);
  const Session session(raw_session, kvexport_close);
  const kvexport_info& info = *kvexport_session_info(session.get());
  char* raw_report = nullptr;
  const Error failed(kvexport_self_test(session.get(), &raw_report), kvexport_error_free);
  const Text report(raw_report, kvexport_text_free);
  if (json && report) std::puts(report.get());
  if (failed) return report_error(failed);
  if (!json)
    std::printf("ok: %s computes the reference outputs (%s, %s)\n", info.engine, info.source, info.dtype);
  return 0;
}
