// What the lanes of a warp do collectively: shuffles, votes, matrix fragments; and the asynchronous copies of a thread.
#include <stdlib.h>
#include <sys/mman.h>

#include "runtime.h"

namespace emu {
namespace {

/// What a lane contributes to an operation on matrices, and its result.
struct Slot {
  union {
    struct {
      Floats4 d;
      Words4 a;
      uint32_t b[2];
    } fragment;
    uint16_t row[8];
  };
};

/// What the lanes contribute to an operation, and the results.
struct Slots {
  uint64_t bits[32];  // for shuffles, votes and reductions
  Slot matrices[32];
};

struct Warp {
  uint32_t arrived;
  uint32_t parity;
  const char *what, *file;  // where its lanes wait
  int line;
  /// Two in alternation: no lane can complete the next operation before all have read their results of this one.
  Slots slots[2];
};
Warp warps[maxWarps];

const char* baseName(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

/// The current lane contributes with `bring(slots)`; the last one computes all results with `complete(slots)`. Returns
/// the slots of this operation.
template <class Bring, class Complete>
inline const Slots& meet(const char* what, uint32_t mask, const char* file, int line, Bring bring, Complete complete) {
  Warp& warp = warps[run.warp];
  if (__builtin_expect(mask != 0xffffffffu, 0))
    stop(launchFailed, {file, line}, "%s with mask 0x%08x: only whole warps are supported", what, mask);
  if (warp.arrived == 0) {
    warp.what = what;
    warp.file = file;
    warp.line = line;
    if (lanesOfWarp() != 0xffffffffu)
      stop(launchFailed, {file, line}, "%s without all lanes: this warp has only %d", what, __builtin_popcount(lanesOfWarp()));
  } else if (__builtin_expect(warp.line != line || warp.file != file || warp.what != what, 0)) {
    stop(launchFailed, {file, line}, "%s without all lanes: others of the warp wait at %s at %s:%d", what, warp.what,
         baseName(warp.file), warp.line);
  }
  Slots& slots = warp.slots[warp.parity];
  bring(slots);
  warp.arrived |= 1u << run.lane;
  if (warp.arrived != 0xffffffffu) {
    waitInWarp(what, file, line);
    return slots;
  }
  warp.arrived = 0;
  warp.parity ^= 1;
  meetPaths(run.warp);
  complete(slots);
  wakeWarp();
  return slots;
}
const auto nothing = [](auto&&) {};

typedef float Row8 __attribute__((vector_size(32)));

template <int Depth, class LoadA, class LoadB>
inline void multiply(Slot* slots, LoadA loadA, LoadB loadB) {
  alignas(64) float a[16][Depth];
  Row8 b[Depth], d[16];
  loadA(a);
  loadB(b);
  for (int lane = 0; lane < 32; lane++) {
    const Floats4& v = slots[lane].fragment.d;
    const int g = lane / 4, t = lane % 4 * 2;
    d[g][t] = v.v[0], d[g][t + 1] = v.v[1], d[g + 8][t] = v.v[2], d[g + 8][t + 1] = v.v[3];
  }
  for (int i = 0; i < 16 && deviceSums; i++)
    for (int j = 0; j < 8; j++) {
      double products[Depth];
      for (int k = 0; k < Depth; k++) products[k] = (double)a[i][k] * b[k][j];
      d[i][j] = addAligned(d[i][j], products, Depth);
    }
  for (int half = 0; half < 16 && !deviceSums; half += 8) {
    Row8 sum[8];
    for (int i = 0; i < 8; i++) sum[i] = d[half + i];
    for (int k = 0; k < Depth; k++)
      for (int i = 0; i < 8; i++) sum[i] += a[half + i][k] * b[k];
    for (int i = 0; i < 8; i++) d[half + i] = sum[i];
  }
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4 * 2;
    slots[lane].fragment.d = {{d[g][t], d[g][t + 1], d[g + 8][t], d[g + 8][t + 1]}};
  }
}

inline float fromBits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float low(uint32_t pair) { return fromBits(pair << 16); }
inline float high(uint32_t pair) { return fromBits(pair & 0xffff0000u); }
inline float tf32(uint32_t bits) { return fromBits(bits & 0xffffe000u); }

}  // namespace

void resetWarp(int warp) {
  warps[warp].arrived = 0;
}

/// Orders the memory accesses of the lanes. A shuffle or vote does not (CUDA guide: they "do not imply a memory
/// barrier").
void warpBarrier(uint32_t mask, const char* file, int line) {
  meet("__syncwarp", mask, file, line, nothing, [](Slots&) {
    run.warpClock[run.warp] = ++run.clock;
    touched[run.warp] = 0;
    if (othersHeard) shareHeard(run.warp);
  });
}

uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t bits, int operand, int width, const char* file, int line) {
  const Slots& slots = meet("a shuffle", mask, file, line, [&](Slots& slots) { slots.bits[run.lane] = bits; }, nothing);
  const int lane = run.lane, first = lane & -width, last = first + width - 1;
  int source;
  switch (kind) {
    case shuffleIndex: source = first + (operand & (width - 1)); break;
    case shuffleXor: source = lane ^ operand; break;
    case shuffleUp: source = lane - operand; break;
    default: source = lane + operand; break;
  }
  if (kind == shuffleUp ? source < first : source > last) source = lane;
  return slots.bits[source & 31];
}

uint64_t combineLanes(uint64_t bits, void (*combine)(uint64_t*, int), int lanes, const char* file, int line) {
  const Slots& slots = meet(
      "a reduction", 0xffffffffu, file, line, [&](Slots& slots) { slots.bits[run.lane] = bits; },
      [&](Slots& slots) { combine(slots.bits, lanes); });
  return slots.bits[run.lane];
}

uint32_t ballot(uint32_t mask, bool value, const char* file, int line) {
  const Slots& slots = meet(
      "a vote", mask, file, line, [&](Slots& slots) { slots.bits[run.lane] = value; },
      [](Slots& slots) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; i++) votes |= (uint32_t)slots.bits[i] << i;
        for (int i = 0; i < 32; i++) slots.bits[i] = votes;
      });
  return (uint32_t)slots.bits[run.lane];
}

Words4 loadMatrices(const void* row, bool transposed, const char* file, int line) {
  const uintptr_t at = (uintptr_t)row;
  if (counting) countAccess(__builtin_return_address(0), at, 16, true, false);
  if (at & 15) stop(misalignedAddress, {file, line}, "misaligned: a matrix row at 0x%zx is not at a multiple of 16", (size_t)at);
  if (checksOn) {
    if (!inShared(at)) stop(illegalAddress, {file, line}, "a matrix row at 0x%zx, which is not shared memory", (size_t)at);
    readShared(at, 16, {file, line});
  }
  atAligned("ldmatrix4", file, line);
  const Slots& slots = meet(
      transposed ? "ldmatrix4Transposed" : "ldmatrix4", 0xffffffffu, file, line,
      [&](Slots& slots) { memcpy(slots.matrices[run.lane].row, row, 16); }, nothing);
  const int g = run.lane / 4, t = run.lane % 4 * 2;
  Words4 result;
  for (int i = 0; i < 4; i++) {
    const Slot* matrix = slots.matrices + 8 * i;
    result.v[i] = transposed ? matrix[t].row[g] | (uint32_t)matrix[t + 1].row[g] << 16 : matrix[g].row[t] | (uint32_t)matrix[g].row[t + 1] << 16;
  }
  return result;
}

Floats4 mmaBf16(Floats4 d, Words4 a, uint32_t b0, uint32_t b1, const char* file, int line) {
  atAligned("mmaBf16", file, line);
  const Slots& slots = meet(
      "mmaBf16", 0xffffffffu, file, line, [&](Slots& slots) { slots.matrices[run.lane].fragment = {d, a, {b0, b1}}; },
      [](Slots& slots) {
        multiply<16>(
            slots.matrices,
            [&](float(&a)[16][16]) {
              for (int lane = 0; lane < 32; lane++) {
                const uint32_t* v = slots.matrices[lane].fragment.a.v;
                const int g = lane / 4, t = lane % 4 * 2;
                a[g][t] = low(v[0]), a[g][t + 1] = high(v[0]), a[g + 8][t] = low(v[1]), a[g + 8][t + 1] = high(v[1]);
                a[g][t + 8] = low(v[2]), a[g][t + 9] = high(v[2]), a[g + 8][t + 8] = low(v[3]), a[g + 8][t + 9] = high(v[3]);
              }
            },
            [&](Row8(&b)[16]) {
              for (int lane = 0; lane < 32; lane++) {
                const uint32_t* v = slots.matrices[lane].fragment.b;
                const int g = lane / 4, t = lane % 4 * 2;
                b[t][g] = low(v[0]), b[t + 1][g] = high(v[0]), b[t + 8][g] = low(v[1]), b[t + 9][g] = high(v[1]);
              }
            });
      });
  return slots.matrices[run.lane].fragment.d;
}

Floats4 mmaTf32(Floats4 d, Words4 a, uint32_t b0, uint32_t b1, const char* file, int line) {
  atAligned("mmaTf32", file, line);
  const Slots& slots = meet(
      "mmaTf32", 0xffffffffu, file, line, [&](Slots& slots) { slots.matrices[run.lane].fragment = {d, a, {b0, b1}}; },
      [](Slots& slots) {
        multiply<8>(
            slots.matrices,
            [&](float(&a)[16][8]) {
              for (int lane = 0; lane < 32; lane++) {
                const uint32_t* v = slots.matrices[lane].fragment.a.v;
                const int g = lane / 4, t = lane % 4;
                a[g][t] = tf32(v[0]), a[g + 8][t] = tf32(v[1]), a[g][t + 4] = tf32(v[2]), a[g + 8][t + 4] = tf32(v[3]);
              }
            },
            [&](Row8(&b)[8]) {
              for (int lane = 0; lane < 32; lane++) {
                const uint32_t* v = slots.matrices[lane].fragment.b;
                const int g = lane / 4, t = lane % 4;
                b[t][g] = tf32(v[0]), b[t + 4][g] = tf32(v[1]);
              }
            });
      });
  return slots.matrices[run.lane].fragment.d;
}

// Asynchronous copies wait in a queue of their thread until it waits for their group, so that a thread that reads too
// early sees the previous contents.

namespace {

struct Copy {
  void* to;
  const void* from;  // null: zeros
  uint32_t bytes, group;
};
constexpr uint32_t queueLength = 1024;
struct Queue {
  uint32_t head, tail;  // monotonic, modulo the length
  uint32_t groups;      // committed so far
  Copy copies[queueLength];
};
Queue* queues;

Queue& queueOf(int thread) {
  if (!queues) {
    void* at = mmap(nullptr, sizeof(Queue) * maxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    queues = (Queue*)at;
  }
  return queues[thread];
}

void landFirst(Queue& queue) {
  const Copy& copy = queue.copies[queue.head++ % queueLength];
  if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
  else memset(copy.to, 0, copy.bytes);
  if (checksOn) landCopyShared((uintptr_t)copy.to, copy.bytes);
  pendingCopies--;
}

}  // namespace

uint32_t pendingCopies;

void copyAsync(void* shared, const void* global, int bytes, bool valid) {
  const uintptr_t to = (uintptr_t)shared, from = (uintptr_t)global;
  if ((to | (valid ? from : 0)) & (bytes - 1))
    stop(misalignedAddress, EMU_HERE, "misaligned: an asynchronous copy of %d bytes from 0x%zx to 0x%zx", bytes, (size_t)from, (size_t)to);
  if (checksOn) {
    if (valid && !inArena(from)) stop(illegalAddress, EMU_HERE, "an asynchronous copy from 0x%zx, which is not device memory", (size_t)from);
    if (!inShared(to)) stop(illegalAddress, EMU_HERE, "an asynchronous copy to 0x%zx, which is not shared memory", (size_t)to);
    if (valid) readGlobal(from, bytes, EMU_HERE);
    checkOverwrite("a copy goes", to, bytes, EMU_HERE);
    beginCopyShared(to, bytes, EMU_HERE);
  }
  if (counting) {
    if (valid) countAccess(__builtin_return_address(0), from, bytes, false, false);
    countAccess(__builtin_return_address(0), to, bytes, true, true);
  }
  Queue& queue = queueOf(run.thread);
  if (queue.tail - queue.head == queueLength) landFirst(queue);
  queue.copies[queue.tail++ % queueLength] = {shared, valid ? global : nullptr, (uint32_t)bytes, queue.groups};
  pendingCopies++;
}

void cpAsyncCommit() { queueOf(run.thread).groups++; }

void cpAsyncWait(int pending) {
  Queue& queue = queueOf(run.thread);
  while (queue.head != queue.tail && (int32_t)(queue.copies[queue.head % queueLength].group - (queue.groups - (uint32_t)pending)) < 0)
    landFirst(queue);
}

void landAllCopies(int thread) {
  Queue& queue = queueOf(thread);
  while (queue.head != queue.tail) landFirst(queue);
}

void dropCopies() {
  if (!pendingCopies) return;
  for (int t = 0; t < maxThreads; t++) queues[t].head = queues[t].tail = 0;
  pendingCopies = 0;
}

}  // namespace emu
