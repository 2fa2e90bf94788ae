// wgmma. Each thread puts products into its own queue. They are computed when the warpgroup waits for their group;
// until then the accumulators contain a marker, so that reading them too early gives NaN.
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <string>
#include <vector>

#include "runtime.h"

namespace emu {
namespace {

constexpr int groupThreads = 128, mostQueued = 64, mostSums = 4;
constexpr uint32_t mark = 0xffc0dead;
constexpr uint32_t inFlight = 0xffffffff;

struct Product {
  bool registers;         // a is in registers
  bool fp8;               // f8e4m3, otherwise bf16
  bool fresh;             // scale-d = 0: overwrites the accumulators
  bool acrossA, acrossB;  // MN-major
  uint64_t a, b;
  uint32_t left[4];       // a in registers: values,
  const uint32_t* leftAt; // and addresses
  int n, sums;
  uint32_t group;
  const char* file;
  int line;
  bool operator==(const Product& o) const { return registers == o.registers && fp8 == o.fp8 && fresh == o.fresh && acrossA == o.acrossA && acrossB == o.acrossB && a == o.a && b == o.b && n == o.n && sums == o.sums && group == o.group && line == o.line; }
};
struct Queue {
  Product products[mostQueued];
  int count;
  uint32_t groups;  // committed so far
  bool fenced;      // since the thread last accessed its accumulators
};
typedef float Row8 __attribute__((vector_size(32)));
/// Accumulators of products in flight: their values, and their addresses in each thread.
struct Sums {
  float values[64][256];
  float* at[groupThreads];
  int n;
};
struct Warpgroup {
  Queue queues[groupThreads];
  Sums sums[mostSums];
  int arrived;
  const char* file;
  int line, pending;
};
Warpgroup* warpgroups;  // as many as a block can have
bool used;
/// The numbers of the warpgroups that committed groups, in that order, in the latest block that had any; and the time
/// when that block started.
std::string closedBy;
uint32_t closedIn;

/// For each 128 bytes of dynamic shared memory and each warp: when products last read there.
constexpr uint32_t lines = (1 << 18 >> 7) + 256;  // reachable by descriptors
uint32_t readAt[lines][maxWarps];

/// When each thread made its writes visible to the async proxy.
std::vector<uint32_t> fences[maxThreads];

Warpgroup& warpgroup() {
  if (!warpgroups) {
    void* at = mmap(nullptr, sizeof(Warpgroup) * maxThreads / groupThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    warpgroups = (Warpgroup*)at;
  }
  return warpgroups[run.thread / groupThreads];
}

/// An operand as specified by its descriptor, with the 128-byte swizzle. K-major: rows of 16 bf16 or 32 f8e4m3, with
/// 1024 bytes per eight rows. MN-major: 16 rows of 64 bf16, with 1024 bytes per eight rows, and the next 64 columns at
/// the descriptor's offset.
struct Operand {
  uint32_t start, next;
  bool across;
  uintptr_t base;
  Operand(uint64_t descriptor, bool across)
      : start((uint32_t)(descriptor & 0x3fff) << 4),
        next((uint32_t)(descriptor >> 16 & 0x3fff) << 4),
        across(across),
        base((uintptr_t)dynamicShared() - sharedAddress(dynamicShared())) {}
  /// The number of lines (rows of at most 64 bf16 in memory) of an operand with `outer` rows.
  int lines(int outer) const { return across ? outer / 64 * 16 : outer; }
  uint32_t plain(int line) const {
    const int row = across ? line % 16 : line;
    return start + (across ? line / 16 * next : 0) + row / 8 * 1024 + row % 8 * 128;
  }
  uintptr_t chunkOf(int line, int chunk) const {
    const uint32_t at = plain(line) + chunk * 16;
    return base + (at ^ (at >> 7 & 7) << 4);
  }
  int chunks() const { return across ? 8 : 2; }
  uint32_t line(int line) const { return plain(line) >> 7; }
  uint8_t byteAt(int outer, int k) const { return ((const uint8_t*)chunkOf(outer, k / 16))[k % 16]; }
  /// Element k of row `outer`.
  uint16_t at(int outer, int k) const {
    return across ? ((const uint16_t*)chunkOf(outer / 64 * 16 + k, outer % 64 / 8))[outer % 8] : ((const uint16_t*)chunkOf(outer, k / 8))[k % 8];
  }
};

void checkDescriptor(uint64_t descriptor, bool across, int rows, const char* name, Where where) {
  const uint64_t swizzle = descriptor >> 62, offset = descriptor >> 49 & 7, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (swizzle != 1 || stride != 1024)
    stop(launchFailed, where, "operand %s: swizzle %d and a stride of %d bytes; only 1 (128 bytes) and 1024 are emulated", name, (int)swizzle, (int)stride);
  const Operand operand(descriptor, across);
  if (offset != 0 || (operand.start & (across ? 0x3ff : 0x380)) != 0 || (across && operand.next % 1024 != 0))
    stop(misalignedAddress, where, "misaligned: operand %s at 0x%x with base offset %d; its first row is not a multiple of 1024", name, operand.start, (int)offset);
  if (!checksOn) return;
  // One lane checks every line; the other lanes only check whether they have waited at all.
  for (int line = 0; line < (run.lane == 0 ? operand.lines(rows) : 1); line++)
    for (int chunk = 0; chunk < operand.chunks(); chunk++) checkOperand(operand.chunkOf(line, chunk), 16, where);
}

void setRead(const Product& product, int warp, uint32_t when) {
  const Operand a(product.a, product.acrossA), b(product.b, product.acrossB);
  for (int line = 0; line < a.lines(64) && !product.registers; line++) readAt[a.line(line)][warp] = when;
  for (int line = 0; line < b.lines(product.n); line++) readAt[b.line(line)][warp] = when;
}

float fromBf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

float fromF8e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = exponent == 15 && fraction == 7 ? NAN : exponent == 0 ? ldexpf((float)fraction, -9) : ldexpf((float)(8 + fraction), exponent - 10);
  return bits & 0x80 ? -size : size;
}

/// The value of the last of the `bits` retained bits of a number of this magnitude.
double lastBitOf(double size, int bits) {
  int exponent;
  frexp(size, &exponent);
  return ldexp(1., exponent - bits);
}

/// Computes the product at this position of all threads' queues.
void multiply(Warpgroup& group, int place) {
  alignas(32) static float left[64][32], right[32][256];
  const Product& product = group.queues[0].products[place];
  Sums& sums = group.sums[product.sums];
  const Operand a(product.a, product.acrossA), b(product.b, product.acrossB);
  const int size = product.fp8 ? 32 : 16;
  const auto element = [&](const Operand& x, int row, int k) { return product.fp8 ? fromF8e4m3(x.byteAt(row, k)) : fromBf16(x.at(row, k)); };
  if (product.fresh) memset(sums.values, 0, sizeof sums.values);
  for (int row = 0; row < 64 && !product.registers; row++)
    for (int k = 0; k < size; k++) left[row][k] = element(a, row, k);
  for (int t = 0; t < groupThreads && product.registers; t++)
    for (int i = 0; i < 8; i++) {
      const uint32_t pair = group.queues[t].products[place].left[i / 2];
      left[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][t % 4 * 2 + i % 2 + i / 4 * 8] = fromBf16((uint16_t)(pair >> i % 2 * 16));
    }
  for (int row = 0; row < product.n; row++)
    for (int k = 0; k < size; k++) right[k][row] = element(b, row, k);
  const bool cut = product.fp8 ? fp8Bits > 0 : deviceSums != 0;
  for (int i = 0; i < 64 && cut; i++)
    for (int j = 0; j < product.n; j++) {
      double products[32];
      for (int k = 0; k < size; k++) products[k] = (double)left[i][k] * right[k][j];
      float& sum = sums.values[i][j];
      sum = product.fp8 ? addAligned(sum, products, size, fp8Bits, fp8Bits) : addAligned(sum, products, size);
    }
  for (int i = 0; i < 64 && !cut; i++)
    for (int j = 0; j < product.n; j += 8) {
      Row8 sum;
      memcpy(&sum, &sums.values[i][j], 32);
      for (int k = 0; k < size; k++) sum += left[i][k] * *(const Row8*)&right[k][j];
      memcpy(&sums.values[i][j], &sum, 32);
    }
}

/// The row of element `i` of a thread's accumulators.
int rowOf(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int columnOf(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

void checkMarks(const float* d, int n, Where where) {
  for (int i = 0; i < n / 2; i++)
    if (memcmp(d + i, &mark, 4) != 0)
      stop(launchFailed, where, "accumulator %d was written while wgmmas that use it are in flight", i);
}

void checkLeft(const Product& product, Where where) {
  if (product.registers && memcmp(product.left, product.leftAt, sizeof product.left) != 0)
    stop(launchFailed, where, "an A operand in registers was written while wgmmas that read it are in flight");
}

/// The index of these accumulators among those in flight; new ones are added.
int sumsAt(Warpgroup& group, float* d, int n, Where where) {
  const int me = run.thread % groupThreads;
  for (int s = 0; s < mostSums; s++) {
    if (group.sums[s].at[me] != d) continue;
    checkMarks(d, n, where);
    if (group.sums[s].n != n) stop(launchFailed, where, "wgmmas of widths %d and %d use the same accumulators", group.sums[s].n, n);
    return s;
  }
  Queue& queue = group.queues[me];
  if (!queue.fenced) stop(launchFailed, where, "a wgmma without wgmmaFence() since this thread accessed the accumulators");
  for (int s = 0; s < mostSums; s++) {
    Sums& sums = group.sums[s];
    if (sums.at[me]) continue;
    sums.at[me] = d;
    sums.n = n;
    for (int i = 0; i < n / 2; i++) {
      sums.values[rowOf(me, i)][columnOf(me, i)] = d[i];
      memcpy(d + i, &mark, 4);
    }
    return s;
  }
  stop(outOfResources, where, "the emulator supports %d accumulators in flight", mostSums);
}

/// Computes the products whose groups must have completed, and returns accumulators that no other product uses.
void finish(Warpgroup& group, uint32_t groups, Where where) {
  Queue& first = group.queues[0];
  for (int t = 1; t < groupThreads; t++) {
    const Queue& other = group.queues[t];
    if (other.count != first.count || !std::equal(first.products, first.products + first.count, other.products))
      stop(launchFailed, where, "thread %d of the warpgroup has issued %d wgmmas and thread 0 %d, or different ones: all 128 threads must issue the same", t,
           other.count, first.count);
  }
  const int firstWarp = run.thread / groupThreads * 4;
  int done = 0;
  while (done < first.count && (int32_t)(first.products[done].group - groups) < 0) {
    for (const Queue& queue : group.queues) checkLeft(queue.products[done], where);
    multiply(group, done);
    for (int w = firstWarp; w < firstWarp + 4; w++) setRead(first.products[done], w, run.clock);
    done++;
  }
  for (int t = 0; t < groupThreads; t++) {
    Queue& queue = group.queues[t];
    std::copy(queue.products + done, queue.products + queue.count, queue.products);
    queue.count -= done;
    queue.fenced = false;
  }
  bool busy[mostSums] = {};
  for (int i = 0; i < first.count; i++) {
    busy[first.products[i].sums] = true;
    for (int w = firstWarp; w < firstWarp + 4; w++) setRead(first.products[i], w, inFlight);
  }
  for (int s = 0; s < mostSums; s++) {
    Sums& sums = group.sums[s];
    if (busy[s] || !sums.at[0]) continue;
    for (int t = 0; t < groupThreads; t++) {
      checkMarks(sums.at[t], sums.n, where);
      for (int i = 0; i < sums.n / 2; i++) sums.at[t][i] = sums.values[rowOf(t, i)][columnOf(t, i)];
      sums.at[t] = nullptr;
    }
  }
}

}  // namespace

int fp8Bits;
int approximate;
int deviceSums;

float addAligned(float sum, const double* products, int count, int bits, int resultBits) {
  double largest = fabs(sum), plain = sum;
  for (int k = 0; k < count; k++) {
    largest = fmax(largest, fabs(products[k]));
    plain += products[k];
  }
  if (largest == 0. || !isfinite(plain)) return (float)plain;
  const double bit = lastBitOf(largest, bits);
  double total = trunc(sum / bit);
  for (int k = 0; k < count; k++) total += trunc(products[k] / bit);
  if (total == 0.) return 0.f;
  const double last = lastBitOf(total, resultBits);
  return (float)(trunc(total / last) * last * bit);
}

void fenceProxyAsync() {
  touched[run.warp] |= 1u << run.lane;
  fences[run.thread].push_back(run.clock++);
}

uint32_t fenceAfter(int thread, uint32_t clock) {
  const auto found = std::lower_bound(fences[thread].begin(), fences[thread].end(), clock);
  return found == fences[thread].end() ? 0 : *found;
}

void wgmmaFence(const char* file, int line) {
  atAligned("wgmmaFence", file, line);
  warpgroup().queues[run.thread % groupThreads].fenced = true;
}

void wgmmaCommit(const char* file, int line) {
  atAligned("wgmmaCommit", file, line);
  warpgroup().queues[run.thread % groupThreads].groups++;
  if (run.thread % groupThreads > 0) return;
  if (closedIn != run.blockClock) closedBy.clear();
  closedIn = run.blockClock;
  closedBy += (char)('0' + run.thread / groupThreads);
}

static void ask(float* d, Product product) {
  const Where where{product.file, product.line};
  const int end = (run.thread / groupThreads + 1) * groupThreads;
  if (end > threadsOfBlock()) stop(launchFailed, where, "a wgmma of a warpgroup with only %d threads", threadsOfBlock() % groupThreads);
  atAligned("a product", product.file, product.line);
  if (!product.registers) checkDescriptor(product.a, product.acrossA, 64, "a", where);
  checkDescriptor(product.b, product.acrossB, product.n, "b", where);
  used = true;
  Warpgroup& group = warpgroup();
  Queue& queue = group.queues[run.thread % groupThreads];
  if (queue.count == mostQueued) stop(outOfResources, where, "%d wgmmas without a wait", mostQueued);
  product.sums = sumsAt(group, d, product.n, where);
  product.group = queue.groups;
  queue.products[queue.count++] = product;
  if (run.lane == 0) setRead(product, run.warp, inFlight);
}
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool acrossA, bool acrossB, bool fresh, const char* file, int line) {
  ask(d, {false, false, fresh, acrossA, acrossB, a, b, {}, nullptr, n, 0, 0, file, line});
}
void wgmma(float* d, int n, const uint32_t* a, uint64_t b, bool across, const char* file, int line) {
  ask(d, {true, false, false, false, across, 0, b, {a[0], a[1], a[2], a[3]}, a, n, 0, 0, file, line});
}
void wgmmaFp8(float* d, uint64_t a, uint64_t b, bool fresh, const char* file, int line) {
  ask(d, {false, true, fresh, false, false, a, b, {}, nullptr, 128, 0, 0, file, line});
}

void waitForProducts(int pending, const char* file, int line) {
  const Where where{file, line};
  atAligned("wgmmaWait", file, line);
  Warpgroup& group = warpgroup();
  if (group.arrived == 0) {
    group.file = file, group.line = line, group.pending = pending;
  } else if (group.line != line || group.file != file || group.pending != pending) {
    stop(launchFailed, where, "wgmmaWait without all threads: others of the warpgroup wait at line %d", group.line);
  }
  if (++group.arrived < groupThreads) return waitInWarp("wgmmaWait", file, line);
  group.arrived = 0;
  const int first = run.thread / groupThreads * groupThreads;
  for (int w = first / 32; w < first / 32 + 4; w++) meetPaths(w);
  if (used) finish(group, group.queues[0].groups - (uint32_t)pending, where);
  for (int t = first; t < first + groupThreads; t++) wakeThread(t);
}

void checkOverwrite(const char* what, uintptr_t address, size_t bytes, Where where) {
  if (!used) return;
  const uint32_t start = sharedAddress((void*)address);
  for (uint32_t line = start >> 7; line < (start + bytes + 127) >> 7 && line < lines; line++)
    for (int w = 0; w < (threadsOfBlock() + 31) / 32; w++) {
      const uint32_t when = readAt[line][w];
      if (when < run.barrierClock) continue;
      if (when == inFlight)
        stop(launchFailed, where, "race: %s to %s, which wgmmas of warp %d in flight read", what, sharedPlace(address).c_str(), w);
      if (w != run.warp && heard[run.thread][ofProducts + w] <= when)
        stop(launchFailed, where, "race: %s to %s, which warp %d may still read: it has not arrived at a barrier that this thread has waited for since", what,
             sharedPlace(address).c_str(), w);
    }
}

void checkProducts() {
  if (used && warpgroup().queues[run.thread % groupThreads].count > 0)
    stop(launchFailed, {nullptr, 0}, "a thread returns while its wgmmas are in flight");
}

void dropProducts() {
  for (auto& times : fences) times.clear();
  if (!used) return;
  used = false;
  memset(readAt, 0, sizeof readAt);
  for (int g = 0; g < maxThreads / groupThreads; g++) {
    Warpgroup& group = warpgroups[g];
    group.arrived = 0;
    for (Queue& queue : group.queues) queue = {};
    for (Sums& sums : group.sums) std::fill(sums.at, sums.at + groupThreads, nullptr);
  }
}

}  // namespace emu

/// The numbers of the warpgroups that committed groups of products in the latest block that had any, in that order.
EMU_EXPORT const char* moe_emulator_products() { return emu::closedBy.c_str(); }
