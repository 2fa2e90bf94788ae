// moe-isa: baseline avx2 avx512 avx512bf16 bf16
//
// Products are divided into tiles of C, which threads take as they become free. A tile loops over k in passes. Each pass packs the tile's
// columns of B into panels (which stay in L2), then A a few panels at a time, and a microkernel keeps a kMr x kNr block of C in registers
// over the whole pass. Packing transposes, pads and rounds to bf16. It costs 2 to 8% of the time at the shapes of experts, which is why
// tiles pack for themselves instead of waiting for each other. The microkernels prefetch what comes next: the rest of B, the next pass
// or the next tile, because products with many small experts are limited by memory bandwidth.
// The layout follows BLIS (Van Zee and van de Geijn 2015).
#include "gemm.h"

#include <vector>

#include "gemm-dots.h"
#include "gemm-kernel.h"
#include "gemm-packing.h"
#include "moe.h"

namespace moe {
namespace {

// Lengths of passes over k. With AVX-512 a panel of A stays in L1 while the tile's packed columns of B come from L2 (1 MB); otherwise a panel of
// B stays in L1 (32 kB) while a group of panels of A comes from L2 (512 kB), which needs less bandwidth from L2.
#if defined(__AVX512F__)
constexpr bool kPanelOfBStays = false;
constexpr int64_t kMaxK[2] = {384, 768}, kMaxTileN[2] = {512, 512};
// Up to this many panels of A share a B that is packed panel by panel even if its rows are not contiguous.
constexpr int64_t kFewPanels = 4;
#else
constexpr bool kPanelOfBStays = true;
#if defined(__AVX2__)
constexpr int64_t kMaxK[2] = {256, 512}, kMaxTileN[2] = {256, 256};
#else
constexpr int64_t kMaxK[2] = {384, 768}, kMaxTileN[2] = {256, 256};
#endif
constexpr int64_t kFewPanels = 1;
#endif

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Passes {
  int64_t count, length;
  Passes(int64_t k, bool bf16) : count(ceil_div(k, kMaxK[bf16])), length(count ? round_up(ceil_div(k, count), 2 * kPairs) : 0) {}
};

struct Tile {
  int64_t job, m0, m1, n0, n1;
};

constexpr size_t kBufferA = static_cast<size_t>(kMostPanels) * (kAWidth * kMaxK[0] + kSlack);
static_assert(!kKeepsRows || (kMr * kPitch <= kAWidth * kMaxK[0] && kMaxK[0] <= kPitch && kMaxK[1] <= 2 * kPitch), "rows need room");
constexpr size_t kBufferB = static_cast<size_t>(kMaxTileN[0]) * kMaxK[0];
constexpr size_t kBuffer = kBufferA + kBufferB;
static_assert(kFewRows * kDotLength <= kBufferA + kBufferB, "packed rows need room");
static_assert(kMaxTileN[1] * kMaxK[1] <= 2 * kMaxTileN[0] * kMaxK[0] && kMaxK[1] <= 2 * kMaxK[0], "bf16 takes half the room");

void tail_copy(const float* from, float* to, std::ptrdiff_t ldc, int rows, int columns, bool accumulate) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) to[i * ldc + j] = accumulate ? to[i * ldc + j] + from[i * kNr + j] : from[i * kNr + j];
}

// A range of memory.
struct Region {
  const char* from = nullptr;
  const char* to = nullptr;

  Region() = default;
  template <class T>
  Region(const T* begin, const T* end) : from(reinterpret_cast<const char*>(begin)), to(reinterpret_cast<const char*>(end)) {}
};

// The operand that is read as B: f32, or the bf16 copy if there is one and products are in bf16.
template <class T>
Operand<T> b_of(const Gemm& g);
template <>
Operand<float> b_of(const Gemm& g) {
  return g.b;
}
template <>
Operand<Bf16> b_of(const Gemm& g) {
  return {g.rounded_b, g.b.lane_stride, g.b.k_stride};
}

// The memory that a pass reads of lanes `lanes0` .. `lanes1` of an operand with `all` lanes, if it is contiguous.
template <class T>
Region region_of(const Operand<T>& operand, int64_t lanes0, int64_t lanes1, int64_t all, int64_t k, const Passes& passes, int64_t pass) {
  if (pass >= passes.count) return {};
  if (operand.k_stride == 1) {
    if (passes.count > 1 || operand.lane_stride != k) return {};
    return {operand.data + lanes0 * k, operand.data + lanes1 * k};
  }
  if (lanes0 > 0 || lanes1 < all || operand.k_stride != all) return {};
  const int64_t k0 = pass * passes.length;
  return {operand.data + k0 * all, operand.data + std::min(k0 + passes.length, k) * all};
}

Region region_of_a(const Gemm& g, const Tile& t, const Passes& passes, int64_t pass) {
  return region_of(g.a, t.m0, t.m1, g.m, g.k, passes, pass);
}

Region region_of_b(const Gemm& g, const Tile& t, const Passes& passes, int64_t pass, bool bf16) {
  if (g.packed_b) return {};
  if (bf16 && g.rounded_b) return region_of(b_of<Bf16>(g), t.n0, t.n1, g.n, g.k, passes, pass);
  return region_of(g.b, t.n0, t.n1, g.n, g.k, passes, pass);
}

// Memory that will be read next, in order: microkernels prefetch one line in each of their steps.
class Ahead {
 public:
  void add(const Region& region) {
    if (region.from < region.to) pieces_[count_++] = Piece(region);
  }
  // Prefetches this before all else, replacing the previous `soon` region.
  void soon(const Region& region) { soon_ = Piece(region); }
  // Prefetches only `soon` regions in the next `blocks` blocks.
  void wait(int64_t blocks) { wait_ = blocks; }
  // Skips everything before `p`.
  void skip_to(const char* p) {
    if (current_ < count_ && p > pieces_[current_].at && p <= pieces_[current_].end) pieces_[current_].at = p;
  }
  int64_t lines() const {
    int64_t sum = 0;
    for (int i = 0; i < count_; ++i) sum += (pieces_[i].end - pieces_[i].at) / 64;
    return sum;
  }
  const char* take(int64_t lines) {
    --wait_;
    if (soon_.at < soon_.end) return soon_.take(lines);
    if (wait_ >= 0) return nullptr;
    if (current_ < count_ && pieces_[current_].at >= pieces_[current_].end) ++current_;
    return current_ < count_ ? pieces_[current_].take(lines) : nullptr;
  }

 private:
  struct Piece {
    const char* at = nullptr;
    const char* end = nullptr;

    Piece() = default;
    explicit Piece(const Region& region) : at(region.from), end(region.to) {}
    const char* take(int64_t lines) {
      const char* p = at;
      at += lines * 64;
      return p;
    }
  };

  Piece soon_, pieces_[3];
  int count_ = 0, current_ = 0;
  int64_t wait_ = 0;
};

/** One register tile, with a special case for columns that do not fill vectors. */
template <bool kBf16, bool kKept>
inline void block(int64_t depth, const float* a, const float* b, std::ptrdiff_t b_stride, float* c, std::ptrdiff_t ldc, int rows,
                  int columns, Output output, Ahead& ahead) {
  const Micro micro = micro_of<kBf16, kKept>(rows, columns);
  const char* line = ahead.take(depth);
  const std::ptrdiff_t step = line ? 64 : 0;
  if (!line) line = reinterpret_cast<const char*>(c);
  if (columns == kNr || columns == lanes) return micro(depth, a, b, b_stride, c, ldc, output, line, step);
  alignas(64) float edge[kMr * kNr];
  micro(depth, a, b, b_stride, edge, kNr, Output::set, line, step);
  tail_copy(edge, c, ldc, rows, columns, output == Output::add);
}

/** Panels `first` .. `first` + count of `panels` equal ones that cover `rows` rows of A. */
template <bool kKept>
inline Panels row_panels(int64_t rows, int64_t panels, int64_t first, int64_t count, int64_t depth) {
  Panels result;
  result.count = int(count);
  for (int64_t q = 0; q <= count; ++q) result.start[q] = rows * (first + q) / panels;
  result.stride = kKept ? kMr * kPitch : depth * kAWidth + kSlack;
  return result;
}

inline Panels column_panels(int64_t columns, int64_t from, int64_t depth) {
  Panels result;
  result.count = int(std::min<int64_t>(kMostPanels, ceil_div(columns - from, kNr)));
  for (int q = 0; q <= result.count; ++q) result.start[q] = std::min<int64_t>(columns, from + q * kNr);
  result.stride = depth * kNr;
  return result;
}

template <bool kBf16, class T>
void pack_columns(const Operand<T>& b, int64_t n0, int64_t columns, int64_t k0, int64_t kc, int64_t depth, float* to) {
  for (int64_t j = 0; j < columns; j += kMostPanels * kNr)
    pack<kBf16, kNr>(b, n0, column_panels(columns, j, depth), k0, kc, to + j * depth);
}

// Computes a tile with few rows of C by dot products, one piece of k after another.
template <bool kBf16, class T>
void run_dots(const Gemm& g, const Tile& t, float* a_buffer) {
  for (int64_t k0 = 0; k0 < g.k; k0 += kDotLength) {
    const int64_t kc = std::min<int64_t>(kDotLength, g.k - k0);
    const int64_t stride = ceil_div(kc, kDotStep<kBf16>) * lanes;
    for (int64_t i = 0; i < g.m; ++i) pack_dot_row<kBf16>(g.a, i, k0, kc, a_buffer + i * stride);
    const T* b = b_of<T>(g).data + t.n0 * g.b.lane_stride + k0;
    float* c = g.c + t.n0;
    const int64_t columns = t.n1 - t.n0;
    const bool accumulate = g.accumulate || k0 > 0;
    switch (g.m) {
      case 1: dot_columns<kBf16, 1>(kc, a_buffer, stride, b, g.b.lane_stride, c, g.ldc, columns, accumulate); break;
      case 2: dot_columns<kBf16, 2>(kc, a_buffer, stride, b, g.b.lane_stride, c, g.ldc, columns, accumulate); break;
      case 3: dot_columns<kBf16, 3>(kc, a_buffer, stride, b, g.b.lane_stride, c, g.ldc, columns, accumulate); break;
      default: dot_columns<kBf16, 4>(kc, a_buffer, stride, b, g.b.lane_stride, c, g.ldc, columns, accumulate); break;
    }
  }
}

// `T`: the type in which B is read.
template <bool kBf16, bool kKept, class T>
void run_tile(const Gemm& g, const Tile& t, float* a_buffer, float* b_buffer, const Gemm* next_job, const Tile* next_tile) {
  const int64_t rows = t.m1 - t.m0, columns = t.n1 - t.n0;
  if (g.m <= kFewRows && g.b.k_stride == 1 && !g.packed_b && g.k > 0) return run_dots<kBf16, T>(g, t, a_buffer);
  const int64_t panels = ceil_div(rows, kMr);
  const Operand<T> b_operand = b_of<T>(g);
  const Passes passes(g.k, kBf16);
  for (int64_t pass = 0; pass < passes.count; ++pass) {
    const int64_t k0 = pass * passes.length, kc = std::min(passes.length, g.k - k0);
    const int64_t depth = depth_of(kc, kBf16);
    // Prefetched during this pass: the rest of B if it is packed panel by panel, then the operands of the next pass or tile.
    Ahead ahead;
    const Region own = region_of_b(g, t, passes, pass, kBf16);
    const bool linear = own.from && g.b.k_stride == 1 && panels <= kMostPanels;
    const int64_t panel_bytes = kNr * g.k * int64_t(sizeof(T));
    if (linear) ahead.add({own.from + panel_bytes, own.to});
    if (pass + 1 < passes.count) {
      ahead.add(region_of_b(g, t, passes, pass + 1, kBf16));
      ahead.add(region_of_a(g, t, passes, pass + 1));
    } else if (next_tile) {
      const Passes next_passes(next_job->k, kBf16);
      ahead.add(region_of_b(*next_job, *next_tile, next_passes, 0, kBf16));
      ahead.add(region_of_a(*next_job, *next_tile, next_passes, 0));
    }
    // Early enough for the end of the pass, but not so early that it evicts what this pass reads repeatedly.
    if (!linear) ahead.wait(panels * ceil_div(columns, kNr) - ceil_div(ahead.lines() * 5 / 4, depth));
    const bool stream = g.stream && passes.count == 1 && (g.ldc % lanes) == 0 && reinterpret_cast<uintptr_t>(g.c) % 64 == 0;
    const Output output = g.accumulate || pass > 0 ? Output::add : stream ? Output::stream : Output::set;
    const float* packed = b_buffer;
    // With few rows B is used once or twice: it is then packed through L1 panel by panel if a panel is contiguous, or otherwise read
    // directly.
    bool late = false, direct = false;
    if (g.packed_b) {
      const int64_t full_depth = depth_of(passes.length, kBf16);
      packed = g.packed_b + pass * full_depth * static_cast<int64_t>(round_up(g.packed_n, kNr)) + (g.packed_from + t.n0) * depth;
    } else if (panels <= kMostPanels && (g.b.k_stride == 1 || panels <= kFewPanels)) {
      late = true;
      direct = !kBf16 && panels == 1 && g.b.lane_stride == 1;
    } else {
      pack_columns<kBf16>(b_operand, t.n0, columns, k0, kc, depth, b_buffer);
    }
    for (int64_t i = 0; i < panels; i += kMostPanels) {
      const Panels group = row_panels<kKept>(rows, panels, i, std::min<int64_t>(kMostPanels, panels - i), depth);
      pack_a<kBf16, kKept>(g.a, t.m0, group, k0, kc, a_buffer);
      if (const int64_t next = i + kMostPanels; next < panels) {
        const Tile rows_after = {0, t.m0 + rows * next / panels, t.m0 + rows * std::min(next + kMostPanels, panels) / panels, 0, 0};
        ahead.soon(region_of_a(g, rows_after, passes, pass));
      }
      const auto block_at = [&](int q, int64_t j, const float* b, std::ptrdiff_t b_stride) {
        block<kBf16, kKept>(depth, a_buffer + q * group.stride, b, b_stride, g.c + (t.m0 + group.start[q]) * g.ldc + t.n0 + j, g.ldc,
                     int(group.start[q + 1] - group.start[q]), int(std::min<int64_t>(kNr, columns - j)), output, ahead);
      };
      if (late || kPanelOfBStays) {
        for (int64_t j = 0; j < columns; j += kNr) {
          const int64_t width = std::min<int64_t>(kNr, columns - j);
          const float* b = late ? b_buffer : packed + j * depth;
          std::ptrdiff_t b_stride = kNr;
          if (linear) ahead.skip_to(own.from + j / kNr * panel_bytes + panel_bytes);
          if (direct && width == kNr)
            b = g.b.data + k0 * g.b.k_stride + t.n0 + j, b_stride = g.b.k_stride;
          else if (late)
            pack_columns<kBf16>(b_operand, t.n0 + j, width, k0, kc, depth, b_buffer);
          for (int q = 0; q < group.count; ++q) block_at(q, j, b, b_stride);
        }
      } else {
        for (int q = 0; q < group.count; ++q)
          for (int64_t j = 0; j < columns; j += kNr) block_at(q, j, packed + j * depth, kNr);
      }
    }
  }
  if (g.stream) finish_stores_past_caches();
  if (g.k == 0 && !g.accumulate)
    for (int64_t i = t.m0; i < t.m1; ++i) std::memset(g.c + i * g.ldc + t.n0, 0, static_cast<size_t>(columns) * 4);
}

template <bool kBf16, class T>
auto tile_runner_of(const Gemm& g) {
  return kKeepsRows && g.a.k_stride == 1 ? run_tile<kBf16, kKeepsRows, T> : run_tile<kBf16, false, T>;
}

template <bool kBf16>
auto tile_runner(const Gemm& g) {
  if constexpr (kBf16)
    if (g.rounded_b) return tile_runner_of<kBf16, Bf16>(g);
  return tile_runner_of<kBf16, float>(g);
}

// Minimum work of a task, in multiply-adds (about 10 us on one core).
constexpr double kLeastWork[2] = {3e5, 6e5};
// Cost of packing an element, in multiply-adds.
constexpr double kPackCost[2] = {5, 9};
// Reading an element of B from memory takes as long as this many multiply-adds; with few rows this dominates.
constexpr int64_t kReadCost = 16;

double work_of(const Gemm& g) { return double(std::max(g.m, kReadCost)) * double(g.n) * double(g.k ? g.k : 1); }

// Divides a product into tiles for `ways` threads: as many as its share of all work requires, in the shape with the least packing.
void cut(std::vector<Tile>& tiles, int64_t job, const Gemm& g, bool bf16, double share, int ways) {
  if (g.m == 0 || g.n == 0) return;
  const int64_t wanted = std::max<int64_t>(1, int64_t(work_of(g) / share + 0.5));
  const int64_t panels = ceil_div(g.m, kMr), blocks = ceil_div(g.n, kNr);
  const int64_t least_across = ceil_div(g.n, kMaxTileN[bf16]);
  int64_t down = 1, across = least_across;
  if (wanted > 1) {
    double best = std::numeric_limits<double>::infinity();
    const int64_t most_down = std::min<int64_t>(wanted, ceil_div(panels, 4)), most_across = std::min(wanted, ceil_div(blocks, 2));
    for (int64_t i = 1; i <= most_down; ++i) {
      const int64_t j = std::max(least_across, std::min(most_across, ceil_div(wanted, i)));
      // The work of the busiest thread, counted in whole tiles of whole panels.
      const double rows = double(ceil_div(panels, i) * kMr), columns = double(ceil_div(blocks, j) * kNr);
      const double turns = double(ceil_div(i * j, ways));
      const double cost = turns * (rows * columns + kPackCost[bf16] * (rows + columns));
      if (cost < best) best = cost, down = i, across = j;
    }
  }
  // Whole panels of rows first, so that inner borders do not create partial panels.
  for (int64_t i = 0; i < down; ++i) {
    const int64_t m0 = g.m * (panels * i / down) / panels, m1 = g.m * (panels * (i + 1) / down) / panels;
    for (int64_t j = 0; j < across; ++j)
      tiles.push_back({job, m0, m1, blocks * j / across * kNr, std::min(g.n, blocks * (j + 1) / across * kNr)});
  }
}

template <bool kBf16>
void run(const Gemm* jobs, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += jobs[i].m == 0 ? 0 : work_of(jobs[i]);
  const int threads = max_threads();
  // A few tiles per thread if they are long, so that a late thread costs little.
  const double tiles_each = total > 3e8 * threads ? 4 : total > 3e7 * threads ? 2 : 1;
  const double share = threads == 1 ? total + 1 : std::max(total / (tiles_each * threads), kLeastWork[kBf16]);
  std::vector<Tile> tiles;
  tiles.reserve(static_cast<size_t>(count + 8 * threads));
  for (int64_t i = 0; i < count; ++i) cut(tiles, i, jobs[i], kBf16, share, threads);
  if (tiles.empty()) return;
  Scratch scratch(kBuffer * 4 * static_cast<size_t>(threads));
  // Small products are grouped into tasks.
  const int64_t bunch = std::max<int64_t>(1, int64_t(double(tiles.size()) * kLeastWork[kBf16] / (total + 1)));
  const int64_t tasks = ceil_div(int64_t(tiles.size()), std::min<int64_t>(bunch, int64_t(tiles.size())));
  parallel_tasks(tasks, [&](int64_t task, int worker) {
    float* buffer = scratch.as<float>() + static_cast<size_t>(worker < threads ? worker : 0) * kBuffer;
    const size_t first_tile = tiles.size() * size_t(task) / size_t(tasks), last = tiles.size() * size_t(task + 1) / size_t(tasks);
    for (size_t i = first_tile; i < last; ++i) {
      // What this worker will probably do next: the following tile, or the first one of the task that will be free then.
      const size_t next = i + 1 < last ? i + 1 : tiles.size() * size_t(task + threads) / size_t(tasks);
      const Tile* next_tile = next < tiles.size() && tiles[next].job != tiles[i].job ? &tiles[next] : nullptr;
      const Gemm* next_job = next_tile ? &jobs[next_tile->job] : nullptr;
      const Gemm& job = jobs[tiles[i].job];
      tile_runner<kBf16>(job)(job, tiles[i], buffer, buffer + kBufferA, next_job, next_tile);
    }
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
    tile_runner<kBf16>(job)(job, tile, buffer, buffer + kBufferA, nullptr, nullptr);
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
  const size_t depth = size_t(depth_of(k, kHasBf16 && bf16));
  return round_up(size_t(n), kNr) * depth;
}

template <bool kBf16, class T>
static void pack_b(const Operand<T>& b, int64_t n, int64_t k, float* to) {
  const Passes passes(k, kBf16);
  const int64_t full_depth = depth_of(passes.length, kBf16), blocks = ceil_div(n, kNr);
  parallel_for(
      blocks, std::max<int64_t>(1, 32768 / (k + 1)),
      [&](int64_t begin, int64_t end, int) {
        for (int64_t pass = 0; pass < passes.count; ++pass) {
          const int64_t k0 = pass * passes.length, kc = std::min(passes.length, k - k0), depth = depth_of(kc, kBf16);
          float* base = to + pass * full_depth * blocks * kNr;
          pack_columns<kBf16>(b, begin * kNr, std::min(n, end * kNr) - begin * kNr, k0, kc, depth, base + begin * kNr * depth);
        }
      });
}

void gemm_pack_b(const GemmOperand& b, const Bf16* rounded, int64_t n, int64_t k, bool bf16, float* to) {
  if constexpr (kHasBf16) {
    if (bf16 && rounded) return pack_b<true>(Operand<Bf16>{rounded, b.lane_stride, b.k_stride}, n, k, to);
    if (bf16) return pack_b<true>(b, n, k, to);
  }
  pack_b<false>(b, n, k, to);
}

}  // namespace moe
