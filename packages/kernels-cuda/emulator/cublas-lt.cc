// cuBLASLt without a GPU: a separate library that queues its products in the emulated driver's streams. Constants,
// sizes and checks are those of cublasLt.h 13.1.1. It rejects what the real library forbids, and what would only work
// there by luck: an algorithm chosen for other layouts, or pointers with less alignment than the heuristic was told.
#include <string.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <vector>

#include "library.h"

namespace {

enum Status { success = 0, notInitialized = 1, invalidValue = 7, executionFailed = 13, notSupported = 15 };
enum Type { f32 = 0, bf16 = 14 };
constexpr int compute32F = 68;
constexpr uint32_t computeType = 2;  // one of the reduction schemes: parts of k in f32 in the workspace
/// From this k on, the first algorithm splits k into two parts (split-K).
constexpr uint64_t splitFrom = 256;

struct Layout {
  uint32_t type;
  int32_t order;
  uint64_t rows, columns;
  int64_t ld;
  int32_t batch;
  int64_t stride;
};
struct Description {
  int32_t compute, scale, pointerMode, transA, transB, transC;
};
struct Preference {
  uint32_t search;
  uint64_t workspace;
  uint32_t reduction;
  uint32_t alignment[4];  // A, B, C, D
};
/// The contents of cublasLtMatmulAlgo_t, which is 64 opaque bytes.
struct Algorithm {
  uint64_t magic, configuration, workspace;
  uint32_t parts;
  uint16_t alignment[4];
};
struct Result {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Algorithm) <= 64 && sizeof(Result) == 96, "as cublasLt.h has them");
constexpr uint64_t magic = 0x4d4f454c54;

std::mutex lock;
std::set<void*> living;  // handles and descriptors
size_t version = 130101, calls;

template <class T>
T* find(T* descriptor) {
  std::lock_guard guard{lock};
  return living.count(descriptor) ? descriptor : nullptr;
}
template <class T>
int create(T** to, const T& value) {
  if (!to) return invalidValue;
  *to = new T(value);
  std::lock_guard guard{lock};
  living.insert(*to);
  return success;
}
template <class T>
int destroy(T* descriptor) {
  std::lock_guard guard{lock};
  if (!living.erase(descriptor)) return invalidValue;
  delete descriptor;
  return success;
}

/// Errors that precede any work of a call: a failure injected by a test, or the driver's state.
int enter(const char* call) {
  int wanted;
  const int state = moe_emulator_enter(call, &wanted);
  if (wanted != 0) return wanted;
  return state == 0 ? success : state < 400 ? notInitialized : executionFailed;
}

size_t bytesOf(uint32_t type) { return type == bf16 ? 2 : 4; }

int checkLayout(const char* name, const Layout& layout) {
  if (layout.order != 0) return refuse(notSupported, "cublasLt: the order of %s is %d: only column-major is emulated", name, layout.order);
  if (layout.rows == 0 || layout.columns == 0 || layout.rows > 0x7fffffff || layout.columns > 0x7fffffff)
    return refuse(invalidValue, "cublasLt: %s has %zu x %zu elements", name, (size_t)layout.rows, (size_t)layout.columns);
  if (layout.ld < (int64_t)layout.rows) return refuse(invalidValue, "cublasLt: %s has an ld of %ld for %zu rows", name, (long)layout.ld, (size_t)layout.rows);
  if (layout.batch < 1) return refuse(invalidValue, "cublasLt: %s has a batch of %d", name, layout.batch);
  if (layout.batch > 1 && layout.stride < layout.ld * (int64_t)layout.columns)
    return refuse(invalidValue, "cublasLt: matrices of %s overlap: a stride of %ld", name, (long)layout.stride);
  return success;
}

int check(const Description& op, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const Layout* const all[] = {&a, &b, &c, &d};
  const char* const names[] = {"A", "B", "C", "D"};
  for (int i = 0; i < 4; i++) {
    if (const int status = checkLayout(names[i], *all[i]); status != success) return status;
    if (all[i]->batch != d.batch) return refuse(invalidValue, "cublasLt: %s has a batch of %d, D of %d", names[i], all[i]->batch, d.batch);
  }
  if (op.compute != compute32F || op.scale != f32 || op.pointerMode != 0 || op.transC != 0)
    return refuse(notSupported, "cublasLt: compute type %d and scale type %d: only f32 is emulated", op.compute, op.scale);
  if (op.transA < 0 || op.transA > 1 || op.transB < 0 || op.transB > 1) return refuse(notSupported, "cublasLt: transposition %d, %d", op.transA, op.transB);
  if (a.type != b.type || (a.type != f32 && a.type != bf16) || c.type != f32 || d.type != f32)
    return refuse(notSupported, "cublasLt: types %u, %u, %u, %u", a.type, b.type, c.type, d.type);
  const uint64_t m = op.transA ? a.columns : a.rows, k = op.transA ? a.rows : a.columns;
  const uint64_t n = op.transB ? b.rows : b.columns, kOfB = op.transB ? b.columns : b.rows;
  if (m != d.rows || n != d.columns || k != kOfB || c.rows != d.rows || c.columns != d.columns)
    return refuse(invalidValue, "cublasLt: sizes differ: %zu x %zu times %zu x %zu gives %zu x %zu", (size_t)m, (size_t)k, (size_t)kOfB, (size_t)n,
                  (size_t)d.rows, (size_t)d.columns);
  return success;
}

/// A number that identifies a configuration.
uint64_t configurationOf(const Description& op, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&](uint64_t value) { hash = (hash ^ value) * 0x100000001b3; };
  for (int32_t value : {op.compute, op.scale, op.transA, op.transB}) mix((uint64_t)value);
  for (const Layout* x : {&a, &b, &c, &d})
    for (uint64_t value : {(uint64_t)x->type, x->rows, x->columns, (uint64_t)x->ld, (uint64_t)x->batch, (uint64_t)x->stride}) mix(value);
  return hash;
}

struct Product {
  Layout a, b, d;
  uintptr_t pointerA, pointerB, pointerC, pointerD, workspace;
  uint64_t k;
  float alpha, beta;
  int32_t transA, transB;
  uint32_t parts;
};
constexpr const char* callName = "cublasLtMatmul";

float read(uint32_t type, uintptr_t address, size_t index) {
  if (type == f32) return ((const float*)address)[index];
  const uint32_t bits = (uint32_t)((const uint16_t*)address)[index] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/// Gathers a matrix as rows of k: rows of op(A), or columns of op(B). Returns false if the memory must not be read.
bool gather(std::vector<float>& to, const Layout& x, uintptr_t address, bool alongColumns) {
  const size_t outer = alongColumns ? x.columns : x.rows, k = alongColumns ? x.rows : x.columns;
  to.resize(outer * k);
  for (size_t column = 0; column < x.columns; column++) {
    const uintptr_t start = address + column * (size_t)x.ld * bytesOf(x.type);
    if (!moe_emulator_access(callName, start, x.rows * bytesOf(x.type), 0)) return false;
    for (size_t row = 0; row < x.rows; row++) to[alongColumns ? column * k + row : row * k + column] = read(x.type, start, row);
  }
  return true;
}

int multiply(const void* arguments) {
  constexpr int illegalAddress = 700;
  Product p;
  memcpy(&p, arguments, sizeof p);
  const size_t m = p.d.rows, n = p.d.columns, k = p.k;
  std::vector<float> a, b;
  for (int32_t batch = 0; batch < p.d.batch; batch++) {
    const uintptr_t c = p.pointerC + (size_t)batch * (size_t)p.d.stride * 4, d = p.pointerD + (size_t)batch * (size_t)p.d.stride * 4;
    if (!gather(a, p.a, p.pointerA + (size_t)batch * (size_t)p.a.stride * bytesOf(p.a.type), p.transA != 0)) return illegalAddress;
    if (!gather(b, p.b, p.pointerB + (size_t)batch * (size_t)p.b.stride * bytesOf(p.b.type), p.transB == 0)) return illegalAddress;
    float* const partial = (float*)(p.workspace + (size_t)batch * p.parts * m * n * 4);
    if (p.parts > 1 && !moe_emulator_access(callName, (uintptr_t)partial, p.parts * m * n * 4, 1)) return illegalAddress;
    for (size_t column = 0; column < n; column++) {
      if (p.beta != 0 && !moe_emulator_access(callName, c + column * (size_t)p.d.ld * 4, m * 4, 0)) return illegalAddress;
      if (!moe_emulator_access(callName, d + column * (size_t)p.d.ld * 4, m * 4, 1)) return illegalAddress;
      for (size_t row = 0; row < m; row++) {
        float sum = 0;
        for (size_t part = 0; part < p.parts; part++) {
          double exact = 0;
          for (size_t i = k * part / p.parts; i < k * (part + 1) / p.parts; i++) exact += (double)a[row * k + i] * (double)b[column * k + i];
          if (p.parts > 1) partial[(part * n + column) * m + row] = (float)exact;
          sum += (float)exact;
        }
        const size_t at = column * (size_t)p.d.ld + row;
        ((float*)d)[at] = p.alpha * sum + (p.beta == 0 ? 0 : p.beta * ((const float*)c)[at]);
      }
    }
  }
  return 0;
}

template <class T>
int set(T& field, const void* from, size_t bytes) {
  if (!from || bytes != sizeof field) return refuse(invalidValue, "cublasLt: an attribute of %zu bytes, not %zu", sizeof field, bytes);
  memcpy(&field, from, bytes);
  return success;
}

}  // namespace

// --- for tests ---

EMU_EXPORT void moe_cublas_lt_set_version(size_t now) { version = now; }
/// The number of products requested so far.
EMU_EXPORT size_t moe_cublas_lt_calls() { return calls; }
/// The number of handles and descriptors that have not been destroyed.
EMU_EXPORT size_t moe_cublas_lt_living() { return living.size(); }

// --- cublasLt.h ---

EMU_EXPORT size_t cublasLtGetVersion() { return version; }
EMU_EXPORT const char* cublasLtGetStatusName(int status) {
  switch (status) {
    case success: return "CUBLAS_STATUS_SUCCESS";
    case notInitialized: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case 3: return "CUBLAS_STATUS_ALLOC_FAILED";
    case invalidValue: return "CUBLAS_STATUS_INVALID_VALUE";
    case executionFailed: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case notSupported: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "unrecognized status";
  }
}

EMU_EXPORT int cublasLtCreate(int** handle) {
  if (const int status = enter("cublasLtCreate"); status != success) return status;
  return create(handle, moe_emulator_device());
}
EMU_EXPORT int cublasLtDestroy(int* handle) { return destroy(handle); }

EMU_EXPORT int cublasLtMatmulDescCreate(Description** to, int compute, int scale) { return create(to, Description{compute, scale, 0, 0, 0, 0}); }
EMU_EXPORT int cublasLtMatmulDescDestroy(Description* description) { return destroy(description); }
EMU_EXPORT int cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* from, size_t bytes) {
  if (!find(description)) return invalidValue;
  switch (attribute) {
    case 0: return set(description->compute, from, bytes);
    case 1: return set(description->scale, from, bytes);
    case 2: return set(description->pointerMode, from, bytes);
    case 3: return set(description->transA, from, bytes);
    case 4: return set(description->transB, from, bytes);
    case 5: return set(description->transC, from, bytes);
    default: return refuse(invalidValue, "cublasLtMatmulDescSetAttribute: attribute %d is not emulated", attribute);
  }
}

EMU_EXPORT int cublasLtMatrixLayoutCreate(Layout** to, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  return create(to, Layout{(uint32_t)type, 0, rows, columns, ld, 1, 0});
}
EMU_EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) { return destroy(layout); }
EMU_EXPORT int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* from, size_t bytes) {
  if (!find(layout)) return invalidValue;
  switch (attribute) {
    case 0: return set(layout->type, from, bytes);
    case 1: return set(layout->order, from, bytes);
    case 2: return set(layout->rows, from, bytes);
    case 3: return set(layout->columns, from, bytes);
    case 4: return set(layout->ld, from, bytes);
    case 5: return set(layout->batch, from, bytes);
    case 6: return set(layout->stride, from, bytes);
    default: return refuse(invalidValue, "cublasLtMatrixLayoutSetAttribute: attribute %d is not emulated", attribute);
  }
}

EMU_EXPORT int cublasLtMatmulPreferenceCreate(Preference** to) { return create(to, Preference{0, 0, 7, {256, 256, 256, 256}}); }
EMU_EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) { return destroy(preference); }
EMU_EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* from, size_t bytes) {
  if (!find(preference)) return invalidValue;
  switch (attribute) {
    case 0: return set(preference->search, from, bytes);
    case 1: return set(preference->workspace, from, bytes);
    case 3: return set(preference->reduction, from, bytes);
    case 5: case 6: case 7: case 8: return set(preference->alignment[attribute - 5], from, bytes);
    default: return refuse(invalidValue, "cublasLtMatmulPreferenceSetAttribute: attribute %d is not emulated", attribute);
  }
}

/// The algorithms: split-K if k is long enough and the workspace allows it, and without a split.
EMU_EXPORT int cublasLtMatmulAlgoGetHeuristic(int* handle, Description* op, Layout* a, Layout* b, Layout* c, Layout* d, Preference* preference,
                                              int most, Result* results, int* count) {
  if (const int status = enter("cublasLtMatmulAlgoGetHeuristic"); status != success) return status;
  if (!find(handle)) return notInitialized;
  if (!find(op) || !find(a) || !find(b) || !find(c) || !find(d) || !find(preference) || most < 1 || !results || !count) return invalidValue;
  if (const int status = check(*op, *a, *b, *c, *d); status != success) return status;
  *count = 0;
  const uint64_t k = op->transA ? a->rows : a->columns;
  const uint64_t workspace = 2 * d->rows * d->columns * (uint64_t)d->batch * 4;
  for (uint32_t parts = 2; parts > 0 && *count < most; parts--) {
    if (parts > 1 && (k < splitFrom || !(preference->reduction & computeType) || preference->workspace < workspace)) continue;
    Algorithm algorithm{magic, configurationOf(*op, *a, *b, *c, *d), parts > 1 ? workspace : 0, parts, {}};
    for (int i = 0; i < 4; i++) algorithm.alignment[i] = (uint16_t)preference->alignment[i];
    Result& result = results[(*count)++];
    memset(&result, 0, sizeof result);
    memcpy(result.algorithm, &algorithm, sizeof algorithm);
    result.workspace = algorithm.workspace;
  }
  return success;
}

EMU_EXPORT int cublasLtMatmul(int* handle, Description* op, const float* alpha, uintptr_t pointerA, Layout* a, uintptr_t pointerB, Layout* b,
                              const float* beta, uintptr_t pointerC, Layout* c, uintptr_t pointerD, Layout* d, const uint64_t* opaque,
                              uintptr_t workspace, size_t workspaceBytes, void* stream) {
  if (const int status = enter(callName); status != success) return status;
  if (!find(handle)) return notInitialized;
  if (*handle != moe_emulator_device()) return refuse(invalidValue, "cublasLtMatmul: the handle was created for device %d, and the current one is %d", *handle, moe_emulator_device());
  if (!find(op) || !find(a) || !find(b) || !find(c) || !find(d) || !alpha || !beta || !opaque) return invalidValue;
  if (const int status = check(*op, *a, *b, *c, *d); status != success) return status;
  Algorithm algorithm;
  memcpy(&algorithm, opaque, sizeof algorithm);
  if (algorithm.magic != magic || algorithm.configuration != configurationOf(*op, *a, *b, *c, *d))
    return refuse(invalidValue, "cublasLtMatmul: the algorithm was found for another product");
  const uintptr_t pointers[] = {pointerA, pointerB, pointerC, pointerD};
  for (int i = 0; i < 4; i++) {
    if (pointers[i] == 0 || pointers[i] % algorithm.alignment[i] != 0)
      return refuse(invalidValue, "cublasLtMatmul: %c at 0x%zx, but the heuristic was called with multiples of %d", "ABCD"[i], (size_t)pointers[i],
                    algorithm.alignment[i]);
  }
  if (algorithm.workspace > workspaceBytes || (algorithm.workspace > 0 && (workspace == 0 || workspace % 16 != 0)))
    return refuse(invalidValue, "cublasLtMatmul: a workspace of %zu bytes at 0x%zx; the algorithm needs %zu bytes", workspaceBytes, (size_t)workspace,
                  (size_t)algorithm.workspace);
  if (pointerC == pointerD && (c->ld != d->ld || c->stride != d->stride)) return refuse(invalidValue, "cublasLtMatmul: C is D but has another layout");
  calls++;
  const Product product{*a,     *b,   *d,         pointerA,   pointerB, pointerC, pointerD, workspace, op->transA ? a->rows : a->columns,
                        *alpha, *beta, op->transA, op->transB, algorithm.parts};
  return moe_emulator_work(callName, multiply, &product, sizeof product, stream, 0) == 0 ? success : executionFailed;
}
