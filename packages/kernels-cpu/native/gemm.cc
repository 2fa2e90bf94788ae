// moe-isa: baseline avx2 avx512 avx512bf16
#include "gemm.h"

#include <vector>

#include "gemm-kernel.h"
#include "moe.h"

namespace moe {
namespace {

// Passes over k: an A panel (kMr x depth) stays in L1, a B block (depth x tile width) in L2.
#ifndef KC32
#define KC32 384
#define KC16 768
#define NT32 512
#define NT16 512
#endif
constexpr int64_t kMaxK[2] = {KC32, KC16};
constexpr int64_t kMaxTileN[2] = {NT32, NT16};
#ifndef BOUTER
#define BOUTER 4
#endif
// Up to so many A panels are packed at once, and then B goes through L1 panel by panel.
constexpr int64_t kFewPanels = BOUTER;
constexpr int64_t kFewRows = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Passes {
  int64_t count, length;
  Passes(int64_t k, bool bf16) : count(ceil_div(k, kMaxK[bf16])), length(count ? round_up(ceil_div(k, count), 2) : 0) {}
};

struct Tile {
  int64_t job, m0, m1, n0, n1;
};

constexpr size_t kBufferA = static_cast<size_t>(kFewPanels * kMr) * kMaxK[0] + 64;
constexpr size_t kBufferB = static_cast<size_t>(kMaxTileN[0]) * kMaxK[0];
constexpr size_t kBuffer = kBufferA + kBufferB + 64;
static_assert(kMaxTileN[1] * kMaxK[1] <= 2 * kMaxTileN[0] * kMaxK[0] && kMaxK[1] <= 2 * kMaxK[0], "bf16 takes half the room");

void tail_copy(const float* from, float* to, std::ptrdiff_t ldc, int rows, int columns, bool accumulate) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) to[i * ldc + j] = accumulate ? to[i * ldc + j] + from[i * kNr + j] : from[i * kNr + j];
}

/** One register tile, with a detour for columns that do not fill vectors. */
template <bool kBf16>
inline void block(int64_t depth, const float* a, const float* b, std::ptrdiff_t b_stride, float* c, std::ptrdiff_t ldc, int rows,
                  int columns, bool accumulate) {
  const Micro micro = micro_of<kBf16>(rows, columns);
  if (columns == kNr || columns == lanes) return micro(depth, a, b, b_stride, c, ldc, accumulate);
  alignas(64) float edge[kMr * kNr];
  micro(depth, a, b, b_stride, edge, kNr, false);
  tail_copy(edge, c, ldc, rows, columns, accumulate);
}

template <bool kBf16>
void run_tile(const Gemm& g, const Tile& t, float* a_buffer, float* b_buffer) {
  const int64_t rows = t.m1 - t.m0, columns = t.n1 - t.n0;
  const int64_t panels = ceil_div(rows, kMr);
  const Passes passes(g.k, kBf16);
  for (int64_t pass = 0; pass < passes.count; ++pass) {
    const int64_t k0 = pass * passes.length, kc = std::min(passes.length, g.k - k0);
    const int64_t depth = kBf16 ? (kc + 1) / 2 : kc;
    const bool accumulate = g.accumulate || pass > 0;
    const float* packed = nullptr;
    if (g.packed_b) {
      const int64_t full_depth = kBf16 ? passes.length / 2 : passes.length;
      packed = g.packed_b + pass * full_depth * static_cast<int64_t>(round_up(g.packed_n, kNr)) + (g.packed_from + t.n0) * depth;
    }
    if (panels <= kFewPanels) {
      const bool direct = !kBf16 && panels == 1 && !packed && g.b.lane_stride == 1;
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t begin = rows * i / panels, end = rows * (i + 1) / panels;
        pack<kBf16>(g.a, t.m0 + begin, int(end - begin), k0, kc, int(end - begin), a_buffer + begin * depth);
      }
      for (int64_t j = 0; j < columns; j += kNr) {
        const int width = int(std::min<int64_t>(kNr, columns - j));
        const float* b = b_buffer;
        std::ptrdiff_t b_stride = kNr;
        if (packed)
          b = packed + j * depth;
        else if (direct && width == kNr)
          b = g.b.data + k0 * g.b.k_stride + t.n0 + j, b_stride = g.b.k_stride;
        else
          pack<kBf16>(g.b, t.n0 + j, width, k0, kc, kNr, b_buffer);
        for (int64_t i = 0; i < panels; ++i) {
          const int64_t begin = rows * i / panels, end = rows * (i + 1) / panels;
          block<kBf16>(depth, a_buffer + begin * depth, b, b_stride, g.c + (t.m0 + begin) * g.ldc + t.n0 + j, g.ldc, int(end - begin),
                       width, accumulate);
        }
      }
      continue;
    }
    if (!packed) {
      for (int64_t j = 0; j < columns; j += kNr)
        pack<kBf16>(g.b, t.n0 + j, int(std::min<int64_t>(kNr, columns - j)), k0, kc, kNr, b_buffer + j * depth);
      packed = b_buffer;
    }
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t begin = rows * i / panels, end = rows * (i + 1) / panels;
      pack<kBf16>(g.a, t.m0 + begin, int(end - begin), k0, kc, int(end - begin), a_buffer);
      for (int64_t j = 0; j < columns; j += kNr)
        block<kBf16>(depth, a_buffer, packed + j * depth, kNr, g.c + (t.m0 + begin) * g.ldc + t.n0 + j, g.ldc, int(end - begin),
                     int(std::min<int64_t>(kNr, columns - j)), accumulate);
    }
  }
  if (g.k == 0 && !g.accumulate)
    for (int64_t i = t.m0; i < t.m1; ++i) std::memset(g.c + i * g.ldc + t.n0, 0, static_cast<size_t>(columns) * 4);
}

// Least work worth a task, in multiply-adds (about 10 us on one core), and the most rows and columns that a tile had better not go below.
constexpr double kLeastWork[2] = {1.2e6, 2.4e6};

void cut(std::vector<Tile>& tiles, int64_t job, const Gemm& g, bool bf16, double share) {
  if (g.m == 0 || g.n == 0) return;
  const double work = double(g.m) * double(g.n) * double(g.k ? g.k : 1);
  int64_t across = ceil_div(g.n, kMaxTileN[bf16]);
  int64_t pieces = std::max<int64_t>(across, int64_t(work / share + 0.5));
  int64_t down = 1;
  if (g.m >= 8 * kMr) {
    down = std::min<int64_t>(ceil_div(pieces, across), g.m / (4 * kMr));
  }
  if (down * across < pieces) across = std::max(across, std::min<int64_t>(ceil_div(pieces, down), ceil_div(g.n, 4 * kNr)));
  const int64_t blocks = ceil_div(g.n, kNr);
  // Whole panels of rows first, so that inner borders cost no low panels.
  const int64_t panels = ceil_div(g.m, kMr);
  for (int64_t i = 0; i < down; ++i) {
    const int64_t m0 = g.m * (panels * i / down) / panels, m1 = g.m * (panels * (i + 1) / down) / panels;
    for (int64_t j = 0; j < across; ++j)
      tiles.push_back({job, m0, m1, blocks * j / across * kNr, std::min(g.n, blocks * (j + 1) / across * kNr)});
  }
}

template <bool kBf16>
void run(const Gemm* jobs, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += double(jobs[i].m) * double(jobs[i].n) * double(jobs[i].k);
  const int threads = max_threads();
  const double share = threads == 1 ? total + 1 : std::max(total / (4 * threads), kLeastWork[kBf16]);
  std::vector<Tile> tiles;
  tiles.reserve(static_cast<size_t>(count + 8 * threads));
  for (int64_t i = 0; i < count; ++i) cut(tiles, i, jobs[i], kBf16, share);
  if (tiles.empty()) return;
  Scratch scratch(kBuffer * 4 * static_cast<size_t>(threads));
  // Small products go in bunches.
  const int64_t bunch = std::max<int64_t>(1, int64_t(double(tiles.size()) * kLeastWork[kBf16] / (total + 1)));
  const int64_t tasks = ceil_div(int64_t(tiles.size()), std::min<int64_t>(bunch, int64_t(tiles.size())));
  parallel_tasks(tasks, [&](int64_t task, int worker) {
    float* buffer = scratch.as<float>() + static_cast<size_t>(worker < threads ? worker : 0) * kBuffer;
    const size_t first_tile = tiles.size() * size_t(task) / size_t(tasks), last = tiles.size() * size_t(task + 1) / size_t(tasks);
    for (size_t i = first_tile; i < last; ++i) run_tile<kBf16>(jobs[tiles[i].job], tiles[i], buffer, buffer + kBufferA);
  });
}

}  // namespace

template <bool kBf16>
static void run_here(const Gemm& job) {
  if (job.m == 0 || job.n == 0) return;
  Scratch scratch(kBuffer * 4);
  float* buffer = scratch.as<float>();
  for (int64_t n0 = 0; n0 < job.n; n0 += kMaxTileN[kBf16]) {
    const Tile tile = {0, 0, job.m, n0, std::min(job.n, n0 + kMaxTileN[kBf16])};
    run_tile<kBf16>(job, tile, buffer, buffer + kBufferA);
  }
}

void gemm_here(const Gemm& job, bool bf16) {
  if (kHasBf16 && bf16)
    run_here<kHasBf16>(job);
  else
    run_here<false>(job);
}

int64_t gemm_column_block() { return kNr; }

bool gemm_has_bf16() { return kHasBf16; }

void gemm(const Gemm* jobs, int64_t count, bool bf16) {
  if (kHasBf16 && bf16)
    run<kHasBf16>(jobs, count);
  else
    run<false>(jobs, count);
}

size_t gemm_packed_b_size(int64_t n, int64_t k, bool bf16) {
  const size_t depth = kHasBf16 && bf16 ? size_t(k + 1) / 2 : size_t(k);
  return round_up(size_t(n), kNr) * depth;
}

template <bool kBf16>
static void pack_b(const GemmOperand& b, int64_t n, int64_t k, float* to) {
  const Passes passes(k, kBf16);
  const int64_t full_depth = kBf16 ? passes.length / 2 : passes.length, blocks = ceil_div(n, kNr);
  parallel_for(
      blocks, std::max<int64_t>(1, 32768 / (k + 1)),
      [&](int64_t begin, int64_t end, int) {
        for (int64_t pass = 0; pass < passes.count; ++pass) {
          const int64_t k0 = pass * passes.length, kc = std::min(passes.length, k - k0), depth = kBf16 ? (kc + 1) / 2 : kc;
          float* base = to + pass * full_depth * blocks * kNr;
          for (int64_t j = begin; j < end; ++j)
            pack<kBf16>(b, j * kNr, int(std::min<int64_t>(kNr, n - j * kNr)), k0, kc, kNr, base + j * kNr * depth);
        }
      });
}

void gemm_pack_b(const GemmOperand& b, int64_t n, int64_t k, bool bf16, float* to) {
  if (kHasBf16 && bf16)
    pack_b<kHasBf16>(b, n, k, to);
  else
    pack_b<false>(b, n, k, to);
}

}  // namespace moe
