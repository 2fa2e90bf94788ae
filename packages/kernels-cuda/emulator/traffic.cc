// Counts memory traffic: the 32-byte sectors that a warp's access to global memory touches, and the passes over the 32
// banks that its access to shared memory takes, each compared with the minimum for the bytes accessed. In kernels
// translated from PTX, each call of an access check is one instruction.
//
// Lanes run one after another, so accesses of the same warp-wide instruction are matched by their count: the third time
// that lane 5 executes an instruction belongs to the third time of the other lanes. If lanes diverge and reconverge
// inside a loop, the match is a guess.
#include <dlfcn.h>
#include <stdio.h>

#include <algorithm>
#include <map>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace emu {

bool counting;

namespace {

struct Access {
  uint32_t lanes;
  uintptr_t addresses[32];
};
/// An instruction of one warp.
struct Open {
  uint32_t counts[32];
  uint32_t first;  // accesses before this one have been counted
  std::vector<Access> accesses;
};
struct Totals {
  uint64_t requests, bytes, actual, fewest;
};
struct Site {
  const Kernel* kernel;
  const void* code;
  int bytes;
  bool shared, write;
  bool operator<(const Site& o) const {
    return std::tie(kernel, code, bytes, shared, write) < std::tie(o.kernel, o.code, o.bytes, o.shared, o.write);
  }
};
std::map<Site, Totals> totals;
std::map<std::pair<int, Site>, Open> open;  // by warp
std::string report;

void close(const Site& site, const Access& access) {
  Totals& sum = totals[site];
  std::vector<uintptr_t> units;
  const auto collect = [&](int from, int to, uintptr_t unit) {
    units.clear();
    for (int lane = from; lane < to; lane++)
      if (access.lanes >> lane & 1)
        for (uintptr_t at = access.addresses[lane] / unit; at <= (access.addresses[lane] + site.bytes - 1) / unit; at++) units.push_back(at);
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
  };
  sum.requests++;
  sum.bytes += (uint64_t)site.bytes * __builtin_popcount(access.lanes);
  if (!site.shared) {
    collect(0, 32, 32);
    sum.actual += units.size();
    collect(0, 32, 1);
    sum.fewest += (units.size() + 31) / 32;
    return;
  }
  // 128 bytes at a time: all lanes, or halves or quarters of them if each accesses 8 or 16 bytes.
  const int part = site.bytes <= 4 ? 32 : 128 / site.bytes;
  for (int lane = 0; lane < 32; lane += part) {
    collect(lane, lane + part, 4);
    if (units.empty()) continue;
    int words[32] = {};
    for (const uintptr_t word : units) words[word & 31]++;
    sum.actual += *std::max_element(words, words + 32);
    sum.fewest += 1;
  }
}

}  // namespace

void countAccess(const void* code, uintptr_t address, int bytes, bool shared, bool write) {
  const Site site{run.kernel, code, bytes, shared, write};
  Open& here = open[{run.warp, site}];
  const uint32_t number = here.counts[run.lane]++ - here.first;
  if (number >= here.accesses.size()) here.accesses.resize(number + 1);
  Access& access = here.accesses[number];
  access.lanes |= 1u << run.lane;
  access.addresses[run.lane] = address;
  // Complete, and so are all before it.
  size_t done = 0;
  while (done < here.accesses.size() && here.accesses[done].lanes == 0xffffffffu) close(site, here.accesses[done++]);
  here.accesses.erase(here.accesses.begin(), here.accesses.begin() + (long)done);
  here.first += (uint32_t)done;
}

void closeAccesses() {
  for (auto& [key, here] : open)
    for (const Access& access : here.accesses)
      if (access.lanes) close(key.second, access);
  open.clear();
}

}  // namespace emu

using namespace emu;

/// Starts counting from zero, or stops.
EMU_EXPORT void moe_emulator_count(int on) {
  counting = on != 0;
  if (on) totals.clear();
}

/// Lines "kernel, offset in this library, bytes per lane, global or shared, read or write, requests, bytes, actual,
/// minimum".
EMU_EXPORT const char* moe_emulator_counted() {
  report.clear();
  Dl_info info{};
  dladdr((const void*)&moe_emulator_counted, &info);
  for (const auto& [site, sum] : totals) {
    char line[300];
    snprintf(line, sizeof line, "%s %zu %d %s %s %llu %llu %llu %llu\n", site.kernel->name, (size_t)((const char*)site.code - (const char*)info.dli_fbase),
             site.bytes, site.shared ? "shared" : "global", site.write ? "write" : "read", (unsigned long long)sum.requests, (unsigned long long)sum.bytes,
             (unsigned long long)sum.actual, (unsigned long long)sum.fewest);
    report += line;
  }
  return report.c_str();
}
