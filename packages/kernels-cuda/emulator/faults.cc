// Records the first few faults as text. Source positions are only resolved when the report is read.
#include <dlfcn.h>
#include <stdio.h>

#include <vector>

#include "runtime.h"

namespace emu {
namespace {

struct Fault {
  std::string text;
  Where where;
  bool located;
  bool refusal;
};
constexpr size_t mostFaults = 8;
std::vector<Fault> faults;
std::string report;

std::string baseName(const std::string& path) { return path.substr(path.rfind('/') + 1); }

/// "softmax.cu:31, called from reduce.cuh:20", from the library's line tables, if addr2line is available.
std::string locate(const void* code) {
  Dl_info info{};
  if (!code || !dladdr(code, &info)) return "";
  char command[1200];
  // One byte back, because a return address may belong to the next line.
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           (size_t)((const char*)code - (const char*)info.dli_fbase - 1));
  std::string found;
  if (FILE* pipe = popen(command, "r")) {
    char line[1000];
    while (fgets(line, sizeof line, pipe)) {
      std::string name = baseName(line);
      while (!name.empty() && (name.back() == '\n' || name.back() == ' ')) name.pop_back();
      if (const size_t extra = name.find(" ("); extra != std::string::npos) name.resize(extra);
      if (name.empty() || name[0] == '?') continue;
      found += (found.empty() ? "" : ", called from ") + name;
    }
    pclose(pipe);
  }
  if (found.empty() && info.dli_sname) found = info.dli_sname;
  return found;
}

}  // namespace

void recordFault(Where where, const char* prefix, const char* format, va_list arguments) {
  if (faults.size() >= mostFaults) return;
  char text[2000];
  vsnprintf(text, sizeof text, format, arguments);
  faults.push_back({std::string(prefix) + ": " + text, where, false, false});
}

void recordRefusal(const char* format, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  // The latest one: a program may be refused often and continue.
  for (size_t i = 0; i < faults.size(); i++)
    if (faults[i].refusal) faults.erase(faults.begin() + (long)i--);
  faults.push_back({std::string("refused: ") + text, {nullptr, 0}, true, true});
}

void clearFaults() { faults.clear(); }

const char* faultReport() {
  report.clear();
  for (Fault& fault : faults) {
    if (!fault.located) {
      fault.located = true;
      const auto [at, line] = fault.where;
      const std::string place = line > 0 ? baseName((const char*)at) + ":" + std::to_string(line) : locate(at);
      if (!place.empty()) fault.text += " [" + place + "]";
    }
    report += fault.text + "\n";
  }
  return report.c_str();
}

}  // namespace emu
