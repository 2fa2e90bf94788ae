// Detects warps that are not converged at warp-wide instructions (".aligned" in PTX: wgmma, mma and ldmatrix). The PTX
// ISA requires that all lanes execute the same instruction. ptxas lets lanes reconverge after branches that it knows
// of; __syncwarp does not rely on that.
//
// Waits on mbarriers, copies and expected bytes are tracked. The arrival of a single lane is not: it is one predicated
// instruction, after which CUTLASS and DeepGEMM issue wgmmas, too. Barriers of a block or warpgroup count as
// convergence points: one lane initializes and all continue, in CUTLASS as here. Other divergence (loads, loops in
// branches) is not detected.
#include <algorithm>
#include <vector>

#include "runtime.h"

namespace emu {
namespace {

struct Step {
  const char* what;
  const char* file;
  int line;
};
/// A warp-wide instruction that a lane has reached, what the lane had done since its warp converged, and the latest of
/// these actions.
struct Passed {
  uint32_t way;
  int steps;
  Step latest, at;
};
struct Path {
  uint32_t way;
  int steps;
  Step latest;
  std::vector<Passed> passed;  // where the lane had done something since the previous one
};
Path paths[maxThreads];
uint32_t walked;  // warps of which a lane did something

const char* baseName(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

void forget(int warp) {
  for (int t = warp * 32; t < warp * 32 + 32; t++) {
    paths[t].way = 0;
    paths[t].steps = 0;
    paths[t].passed.clear();
  }
  walked &= ~(1u << warp);
}

}  // namespace

void walk(const char* what, const char* file, int line) {
  Path& path = paths[run.thread];
  path.way = (path.way ^ ((uint32_t)(uintptr_t)file + (uint32_t)line)) * 0x01000193u;
  path.steps++;
  path.latest = {what, file, line};
  walked |= 1u << run.warp;
}

void atAligned(const char* what, const char* file, int line) {
  if (__builtin_expect(!(walked >> run.warp & 1), 1)) return;
  Path& path = paths[run.thread];
  if (path.steps > (path.passed.empty() ? 0 : path.passed.back().steps)) path.passed.push_back({path.way, path.steps, path.latest, {what, file, line}});
}

void meetPaths(int warp) {
  if (__builtin_expect(!(walked >> warp & 1), 1)) return;
  Path* const lanes = paths + warp * 32;
  static const Passed nothing{};
  for (int lane = 1; lane < 32; lane++)
    for (size_t i = 0; i < std::max(lanes[0].passed.size(), lanes[lane].passed.size()); i++) {
      const auto passed = [&](int of) -> const Passed& { return i < lanes[of].passed.size() ? lanes[of].passed[i] : nothing; };
      if (passed(0).way == passed(lane).way) continue;
      const int more = passed(lane).steps > passed(0).steps ? lane : 0;
      const auto& [what, file, line] = passed(more).at;
      const Step& latest = passed(more).latest;
      stop(launchFailed, {file, line}, "%s is warp-wide, but warp %d has not converged since its lanes diverged: lane %d comes from %s (%s:%d), lane %d does not; a __syncwarp() is missing",
           what, warp, more, latest.what, baseName(latest.file), latest.line, lane - more);
    }
  forget(warp);
}

void resetPaths() {
  for (int warp = 0; warp < maxWarps && walked; warp++) forget(warp);
}

}  // namespace emu
