// The driver API under its own names. Every call holds one lock.
#include <stdio.h>
#include <stdlib.h>

#include "entry.h"

namespace emu {
std::recursive_mutex lock;
Kernel* kernels;
void registerKernel(Kernel* kernel) {
  kernel->next = kernels;
  kernels = kernel;
}
}  // namespace emu

using namespace emu;

namespace {

bool initialized;
int retained;  // owners of the primary context
std::map<std::string, std::pair<int, int>> injected;  // by call: which following one fails, and how

struct Module {
  std::string name;
  std::map<std::string, std::unique_ptr<Function>> functions;
};
std::set<Module*> modules;
std::set<Function*> functions;

int capabilityNow;
int capability() {
  if (capabilityNow == 0) {
    const char* text = getenv("MOE_EMULATOR_CAPABILITY");
    const int given = text ? atoi(text) : 0;
    capabilityNow = given >= 50 ? given : 80;
  }
  return capabilityNow;
}
uint32_t maxShared() {
  switch (capability()) {
    case 80: case 87: return 166912;
    case 90: case 100: case 103: return 232448;
    default: return 101376;
  }
}

bool isPinned(const void* pointer, size_t bytes) {
  const auto next = context().pinned.upper_bound((uintptr_t)pointer);
  if (next == context().pinned.begin()) return false;
  const auto& [start, length] = *std::prev(next);
  return (uintptr_t)pointer + bytes <= start + length;
}

/// Whether a capture forbids calls that may wait for the device (one in relaxed mode does not).
bool captureForbids() {
  for (Stream* stream : context().streams)
    if (stream->capture && !stream->captureRelaxed) return true;
  return false;
}

// Kernels and their arguments.

size_t packedBytes(const Kernel& kernel) {
  size_t at = 0;
  for (const Parameter* p = kernel.parameters; p->letter; p++) at = (at + p->align - 1) / p->align * p->align + p->size;
  return at;
}

std::string signatureOf(const Kernel& kernel) {
  std::string text;
  for (const Parameter* p = kernel.parameters; p->letter; p++) {
    if (!text.empty()) text += ' ';
    text += p->letter;
    if (p->count) text += "[" + std::to_string(p->count) + "]";
  }
  return text;
}

/// Arguments that come by their addresses, packed.
std::vector<char> packArguments(const Kernel& kernel, void** addresses) {
  std::vector<char> packed(packedBytes(kernel));
  size_t at = 0;
  for (const Parameter* p = kernel.parameters; p->letter; p++, addresses++) {
    at = (at + p->align - 1) / p->align * p->align;
    memcpy(packed.data() + at, *addresses, p->size);
    at += p->size;
  }
  return packed;
}

void startOver() {
  clearFaults();
  Context& all = context();
  all.error = ok;
  all.null.queue.clear();
  for (Stream* stream : all.streams) {
    stream->queue.clear();
    stream->capture.reset();
    stream->captureBroken = false;
  }
  all.failLaunchAfter = 0;
  injected.clear();
  freeEverything();
}

/// With its last owner the context goes, and all that was made in it. Whoever uses a handle of it afterwards is told so, where a driver may crash.
void closeContext() {
  Context& all = context();
  all.null.queue.clear();
  for (Stream* stream : all.streams) delete stream;
  all.streams.clear();
  all.events.clear();
  for (const auto& [address, _] : all.pinned) free((void*)address);
  all.pinned.clear();
  for (Module* module : modules) delete module;
  modules.clear();
  functions.clear();
  freeEverything();
}

}  // namespace

namespace emu {

Entry::Entry(const char* call, bool needsContext, const char* group) {
  if (!initialized) status = notInitialized;
  else if (needsContext && retained == 0) {
    status = invalidContext;
    recordRefusal("%s without a context", call);
  }
  else if (needsContext) status = context().error;
  if (status == ok) status = (Status)injectedFailure(call);
  if (status == ok && group) status = (Status)injectedFailure(group);
}

int injectedFailure(const char* call) {
  if (injected.empty()) return 0;
  const auto found = injected.find(call);
  if (found == injected.end() || --found->second.first > 0) return 0;
  const int status = found->second.second;
  injected.erase(found);
  return status;
}

Status breakCapture(Stream& stream) {
  stream.captureBroken = true;
  return captureUnsupported;
}

Operation operation(Operation::Kind kind, const char* call) {
  Operation op{};
  op.kind = kind;
  op.call = call;
  return op;
}

Status unpackExtra(void** extra, const void** buffer, size_t* bytes) {
  *buffer = nullptr;
  *bytes = 0;
  if (!extra) return invalidValue;
  for (; *extra; extra += 2) {
    if (*extra == (void*)1) *buffer = extra[1];
    else if (*extra == (void*)2) *bytes = *(size_t*)extra[1];
    else return invalidValue;
  }
  return *buffer || *bytes == 0 ? ok : invalidValue;
}

Status checkLaunch(const Function& function, Dim3 grid, Dim3 block, uint32_t shared, size_t bytes) {
  const Kernel& kernel = *function.kernel;
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    recordRefusal("%s: a grid of %u x %u x %u blocks", kernel.name, grid.x, grid.y, grid.z);
    return invalidValue;
  }
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) {
    recordRefusal("%s: blocks of %u x %u x %u threads", kernel.name, block.x, block.y, block.z);
    return invalidValue;
  }
  if (threads > (uint64_t)kernel.maxThreads) {
    recordRefusal("%s: blocks of %u threads, its launch bounds allow %d", kernel.name, (unsigned)threads, kernel.maxThreads);
    return outOfResources;
  }
  // Without an attribute 48 KiB are for static and dynamic shared memory together.
  const size_t allowed = function.maxDynamicShared > 0 ? function.maxDynamicShared : (48 << 10) - kernel.staticShared;
  if (shared > allowed || kernel.staticShared + shared > maxShared()) {
    recordRefusal("%s: %u bytes of dynamic shared memory; its attribute allows %zu, the device %u with %zu static ones", kernel.name, shared, allowed, maxShared(),
                  kernel.staticShared);
    return invalidValue;
  }
  if (bytes != packedBytes(kernel)) {
    recordRefusal("%s: %zu bytes of arguments, its parameters (%s) take %zu", kernel.name, bytes, signatureOf(kernel).c_str(),
                  packedBytes(kernel));
    return invalidValue;
  }
  return ok;
}

Function* functionOf(void* handle) { return functions.count((Function*)handle) ? (Function*)handle : nullptr; }

}  // namespace emu

EMU_EXPORT int cuInit(unsigned flags);

// --- for tests ---

EMU_EXPORT const char* moe_emulator_report() {
  std::lock_guard guard{lock};
  return faultReport();
}
EMU_EXPORT void moe_emulator_reset() {
  std::lock_guard guard{lock};
  if (initialized) startOver();
}
EMU_EXPORT const char* moe_emulator_kernels() {
  std::lock_guard guard{lock};
  static std::string text;
  text.clear();
  for (const Kernel* k = kernels; k; k = k->next)
    text += std::string(k->module) + " " + k->name + " " + std::to_string(k->maxThreads) + " " + signatureOf(*k) + "\n";
  return text.c_str();
}
EMU_EXPORT void moe_emulator_fail(const char* call, int after, int status) {
  std::lock_guard guard{lock};
  if (strcmp(call, "launch") == 0) {
    context().failLaunchAfter = after;
    context().failLaunch = (Status)status;
  } else {
    injected[call] = {after, status};
  }
}
/// "readsHost", and "checks", "lazy", "reversed" and "capability" over the variables of the environment. Checks are switched on again after a reset only: what happened without
/// them left no marks.
EMU_EXPORT void moe_emulator_set(const char* name, int value) {
  std::lock_guard guard{lock};
  cuInit(0);
  if (strcmp(name, "lazy") == 0) context().lazy = value != 0;
  if (strcmp(name, "readsHost") == 0) context().readsHost = value != 0;
  if (strcmp(name, "reversed") == 0) reversed = value != 0;
  if (strcmp(name, "capability") == 0) capabilityNow = value;
  if (strcmp(name, "checks") == 0) {
    checksOn = value != 0;
    reserveMemory();
    reserveShared();
  }
}
EMU_EXPORT int moe_emulator_mark(uintptr_t address, size_t bytes, size_t capacity, void* stream) {
  ENTER("moe_emulator_mark");
  Stream* on = streamOf(stream);
  if (!on || bytes > capacity) return invalidValue;
  Operation op = operation(Operation::mark, "moe_emulator_mark");
  op.to = address;
  op.bytes = bytes;
  op.capacity = capacity;
  return enqueue(*on, std::move(op));
}

// --- device and context ---

EMU_EXPORT int cuInit(unsigned) {
  std::lock_guard guard{lock};
  if (!initialized) {
    const char* checks = getenv("MOE_EMULATOR_CHECKS");
    checksOn = !(checks && checks[0] == '0');
    const char* lazy = getenv("MOE_EMULATOR_LAZY");
    context().lazy = !(lazy && lazy[0] == '0');
    const char* order = getenv("MOE_EMULATOR_ORDER");
    reversed = order && strcmp(order, "reversed") == 0;
    findImage();
    reserveStacks();
    reserveMemory();
    reserveShared();
    initialized = true;
  }
  return Entry("cuInit", false).status;
}
EMU_EXPORT int cuDriverGetVersion(int* version) {
  *version = 13000;
  return ok;
}
EMU_EXPORT int cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount", false);
  *count = 1;
  return ok;
}
EMU_EXPORT int cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet", false);
  *device = 0;
  return ordinal == 0 ? ok : 101;
}
EMU_EXPORT int cuDeviceGetName(char* name, int length, int) {
  ENTER("cuDeviceGetName", false);
  snprintf(name, (size_t)length, "emulated device");
  return ok;
}
EMU_EXPORT int cuDeviceGetUuid(unsigned char* uuid, int) {
  ENTER("cuDeviceGetUuid", false);
  memcpy(uuid, "moe emulator 0\0\0", 16);
  return ok;
}
EMU_EXPORT int cuDeviceGetUuid_v2(unsigned char* uuid, int device) { return cuDeviceGetUuid(uuid, device); }
EMU_EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
  ENTER("cuDeviceTotalMem_v2", false);
  *bytes = memoryTotal();
  return ok;
}
EMU_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  ENTER("cuDeviceGetAttribute", false);
  switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break;  // threads of a block, its x and y
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;  // grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = 48 << 10; break;  // shared memory of a block
    case 9: *value = 64 << 10; break;
    case 10: *value = 32; break;
    case 12: case 82: *value = 65536; break;  // registers
    case 13: case 36: *value = 1000000; break;  // clocks, kHz
    case 16: *value = 4; break;  // multiprocessors
    case 37: *value = 256; break;
    case 38: *value = 4 << 20; break;
    case 39: *value = 2048; break;
    case 31: case 40: case 41: case 115: *value = 1; break;  // concurrent kernels, copy engine, unified addresses, memory pools
    case 75: *value = capability() / 10; break;
    case 76: *value = capability() % 10; break;
    case 81: *value = (int)maxShared() + 1024; break;
    case 97: *value = (int)maxShared(); break;
    case 100: *value = context().readsHost; break;
    default: *value = 0;
  }
  return attribute > 0 && attribute < 200 ? ok : invalidValue;
}
EMU_EXPORT int cuDevicePrimaryCtxRetain(void** handle, int) {
  ENTER("cuDevicePrimaryCtxRetain", false);
  retained++;
  *handle = &context();
  return ok;
}
EMU_EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
  ENTER("cuDevicePrimaryCtxRelease_v2", false);
  if (retained == 0) return invalidContext;
  if (--retained == 0) closeContext();
  return ok;
}
EMU_EXPORT int cuCtxSetCurrent(void*) {
  ENTER("cuCtxSetCurrent", false);
  return ok;
}
EMU_EXPORT int cuCtxGetCurrent(void** handle) {
  ENTER("cuCtxGetCurrent", false);
  *handle = retained ? &context() : nullptr;
  return ok;
}
EMU_EXPORT int cuCtxSynchronize() {
  ENTER("cuCtxSynchronize");
  if (captureForbids()) return captureUnsupported;
  return runEverything();
}

// --- streams and events ---

EMU_EXPORT int cuStreamCreate(void** handle, unsigned flags) {
  ENTER("cuStreamCreate");
  Stream* stream = new Stream;
  stream->blocking = (flags & 1) == 0;
  context().streams.insert(stream);
  *handle = stream;
  return ok;
}
EMU_EXPORT int cuStreamDestroy_v2(void* handle) {
  ENTER("cuStreamDestroy_v2");
  Stream* stream = streamOf(handle);
  if (!stream || stream == &context().null) return invalidHandle;
  const Status status = runAll(*stream);
  for (auto& [_, event] : context().events)
    if (event->stream == stream) event->stream = nullptr;
  const auto forget = [&](Stream& other) {
    for (Operation& op : other.queue)
      if (op.kind == Operation::wait && op.stream == stream) op.stream = nullptr;
  };
  forget(context().null);
  for (Stream* other : context().streams) forget(*other);
  context().streams.erase(stream);
  delete stream;
  return status;
}
EMU_EXPORT int cuStreamSynchronize(void* handle) {
  ENTER("cuStreamSynchronize");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (stream->capture) return breakCapture(*stream);
  return runAll(*stream);
}
EMU_EXPORT int cuStreamQuery(void* handle) {
  ENTER("cuStreamQuery");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (stream->capture) return breakCapture(*stream);
  if (stream->queue.empty()) return ok;
  if (!stream->asked) {
    stream->asked = true;
    return notReady;
  }
  return runAll(*stream);
}
EMU_EXPORT int cuStreamWaitEvent(void* handle, void* eventHandle, unsigned) {
  ENTER("cuStreamWaitEvent");
  Stream* stream = streamOf(handle);
  const auto event = context().events.find((Event*)eventHandle);
  if (!stream || event == context().events.end()) return invalidHandle;
  if (event->second->captured || stream->capture) return stream->capture ? ok : captureUnsupported;
  if (event->second->recorded == 0) return ok;
  Operation op = operation(Operation::wait, "cuStreamWaitEvent");
  op.stream = event->second->stream;
  op.until = event->second->recorded;
  return enqueue(*stream, std::move(op));
}
EMU_EXPORT int cuEventCreate(void** handle, unsigned flags) {
  ENTER("cuEventCreate");
  auto event = std::make_shared<Event>();
  event->timed = (flags & 2) == 0;
  *handle = event.get();
  context().events[event.get()] = event;
  return ok;
}
EMU_EXPORT int cuEventDestroy_v2(void* handle) {
  ENTER("cuEventDestroy_v2");
  return context().events.erase((Event*)handle) ? ok : invalidHandle;
}
EMU_EXPORT int cuEventRecord(void* handle, void* streamHandle) {
  ENTER("cuEventRecord");
  Stream* stream = streamOf(streamHandle);
  const auto event = context().events.find((Event*)handle);
  if (!stream || event == context().events.end()) return invalidHandle;
  if (stream->capture) {
    event->second->captured = true;
    return ok;
  }
  Operation op = operation(Operation::record, "cuEventRecord");
  op.event = event->second;
  return enqueue(*stream, std::move(op));
}
EMU_EXPORT int cuEventSynchronize(void* handle) {
  ENTER("cuEventSynchronize");
  const auto event = context().events.find((Event*)handle);
  if (event == context().events.end()) return invalidHandle;
  if (event->second->captured) return captureUnsupported;
  if (event->second->done >= event->second->recorded || !event->second->stream) return ok;
  return runThrough(*event->second->stream, event->second->recorded);
}
EMU_EXPORT int cuEventQuery(void* handle) {
  ENTER("cuEventQuery");
  const auto event = context().events.find((Event*)handle);
  if (event == context().events.end()) return invalidHandle;
  if (event->second->captured) return captureUnsupported;
  if (event->second->done >= event->second->recorded) return ok;
  if (!event->second->asked) {
    event->second->asked = true;
    return notReady;
  }
  return event->second->stream ? runThrough(*event->second->stream, event->second->recorded) : ok;
}
EMU_EXPORT int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  ENTER("cuEventElapsedTime");
  const auto a = context().events.find((Event*)start), b = context().events.find((Event*)end);
  if (a == context().events.end() || b == context().events.end()) return invalidHandle;
  if (!a->second->timed || !b->second->timed || a->second->recorded == 0 || b->second->recorded == 0) return invalidHandle;
  if (a->second->done < a->second->recorded || b->second->done < b->second->recorded) return notReady;
  *milliseconds = (float)(1e3 * (b->second->seconds - a->second->seconds));
  return ok;
}
EMU_EXPORT int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) { return cuEventElapsedTime(milliseconds, start, end); }

// --- memory ---

static Status allocateBytes(uintptr_t* address, size_t bytes) {
  if (bytes == 0) return invalidValue;
  *address = reserveAllocation(bytes);
  if (!*address) {
    // What waits in queues may free some.
    if (const Status status = runEverything(); status != ok) return status;
    *address = reserveAllocation(bytes);
  }
  return *address ? ok : outOfMemory;
}

EMU_EXPORT int cuMemAlloc_v2(uintptr_t* address, size_t bytes) {
  ENTER("cuMemAlloc_v2", true, "alloc");
  if (captureForbids()) return captureUnsupported;
  const Status status = allocateBytes(address, bytes);
  if (status == ok) openAllocation(*address);
  return status;
}
EMU_EXPORT int cuMemFree_v2(uintptr_t address) {
  ENTER("cuMemFree_v2");
  if (!address) return ok;
  if (captureForbids()) return captureUnsupported;
  if (!knowsAllocation(address)) {
    recordRefusal("cuMemFree of 0x%zx, which is no allocation", (size_t)address);
    return invalidValue;
  }
  const Status status = runEverything();  // a device waits for its work before it frees
  closeAllocation(address);
  return status;
}
EMU_EXPORT int cuMemAllocAsync(uintptr_t* address, size_t bytes, void* handle) {
  ENTER("cuMemAllocAsync", true, "alloc");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (stream->capture) return breakCapture(*stream);  // graphs that own memory are not emulated
  if (const Status status = allocateBytes(address, bytes); status != ok) return status;
  Operation op = operation(Operation::allocate, "cuMemAllocAsync");
  op.to = *address;
  return enqueue(*stream, std::move(op));
}
EMU_EXPORT int cuMemFreeAsync(uintptr_t address, void* handle) {
  ENTER("cuMemFreeAsync");
  if (!address) return ok;
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (stream->capture) return breakCapture(*stream);
  if (!knowsAllocation(address)) {
    recordRefusal("cuMemFreeAsync of 0x%zx, which is no allocation", (size_t)address);
    return invalidValue;
  }
  Operation op = operation(Operation::release, "cuMemFreeAsync");
  op.to = address;
  return enqueue(*stream, std::move(op));
}
EMU_EXPORT int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  ENTER("cuMemHostAlloc", true, "alloc");
  *pointer = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
  if (!*pointer) return outOfMemory;
  context().pinned[(uintptr_t)*pointer] = bytes;
  return ok;
}
EMU_EXPORT int cuMemFreeHost(void* pointer) {
  ENTER("cuMemFreeHost");
  if (!context().pinned.count((uintptr_t)pointer)) return invalidValue;
  const Status status = runEverything();
  context().pinned.erase((uintptr_t)pointer);
  free(pointer);
  return status;
}
EMU_EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
  ENTER("cuMemGetInfo_v2");
  *total = memoryTotal();
  *free = memoryTotal() - memoryUsed();
  return ok;
}

static int copyIn(const char* call, uintptr_t to, const void* from, size_t bytes, void* handle, bool wait) {
  ENTER(call);
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (bytes == 0) return ok;
  const bool pinned = isPinned(from, bytes);
  if (stream->capture && (wait || !pinned)) return breakCapture(*stream);
  Operation op = operation(Operation::copyIn, call);
  op.to = to;
  op.bytes = bytes;
  if (pinned || (context().readsHost && !wait)) op.from = (uintptr_t)from;
  else op.data.assign((const char*)from, (const char*)from + bytes);
  const Status status = enqueue(*stream, std::move(op));
  return wait && status == ok ? runAll(*stream) : status;
}
static int copyOut(const char* call, void* to, uintptr_t from, size_t bytes, void* handle, bool wait) {
  ENTER(call);
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (bytes == 0) return ok;
  const bool pinned = isPinned(to, bytes);
  if (stream->capture && (wait || !pinned)) return breakCapture(*stream);
  Operation op = operation(Operation::copyOut, call);
  op.to = (uintptr_t)to;
  op.from = from;
  op.bytes = bytes;
  const Status status = enqueue(*stream, std::move(op));
  // Into pageable memory the call returns with the data in place.
  return (wait || !pinned) && status == ok ? runAll(*stream) : status;
}
EMU_EXPORT int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, void* stream) {
  return copyIn("cuMemcpyHtoDAsync", to, from, bytes, stream, false);
}
EMU_EXPORT int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, void* stream) {
  return copyOut("cuMemcpyDtoHAsync", to, from, bytes, stream, false);
}
EMU_EXPORT int cuMemcpyHtoD_v2(uintptr_t to, const void* from, size_t bytes) { return copyIn("cuMemcpyHtoD", to, from, bytes, nullptr, true); }
EMU_EXPORT int cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t bytes) { return copyOut("cuMemcpyDtoH", to, from, bytes, nullptr, true); }
EMU_EXPORT int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void* handle) {
  ENTER("cuMemcpyDtoDAsync");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (bytes == 0) return ok;
  Operation op = operation(Operation::copyWithin, "cuMemcpyDtoDAsync");
  op.to = to;
  op.from = from;
  op.bytes = bytes;
  return enqueue(*stream, std::move(op));
}
static int fill(const char* call, uintptr_t to, uint32_t value, uint32_t width, size_t count, void* handle) {
  ENTER(call);
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (to % width != 0) return invalidValue;
  if (count == 0) return ok;
  Operation op = operation(Operation::fill, call);
  op.to = to;
  op.value = value;
  op.width = width;
  op.bytes = count * width;
  return enqueue(*stream, std::move(op));
}
EMU_EXPORT int cuMemsetD8Async(uintptr_t to, unsigned char value, size_t count, void* stream) {
  return fill("cuMemsetD8Async", to, value, 1, count, stream);
}
EMU_EXPORT int cuMemsetD16Async(uintptr_t to, unsigned short value, size_t count, void* stream) {
  return fill("cuMemsetD16Async", to, value, 2, count, stream);
}
EMU_EXPORT int cuMemsetD32Async(uintptr_t to, unsigned value, size_t count, void* stream) {
  return fill("cuMemsetD32Async", to, value, 4, count, stream);
}

// --- modules and launches ---

EMU_EXPORT int cuModuleLoadData(void** handle, const void* image) {
  ENTER("cuModuleLoadData");
  // Long enough for what a real image starts with, and no longer: it need not end in a zero.
  static const char magic[] = "moe-emulated-module ";
  const char* text = (const char*)image;
  for (size_t i = 0; i + 1 < sizeof magic; i++) {
    if (text[i] == magic[i]) continue;
    const unsigned char* bytes = (const unsigned char*)image;
    const bool fatbin = bytes[0] == 0x50 && bytes[1] == 0xed && bytes[2] == 0x55 && bytes[3] == 0xba;
    const bool elf = bytes[0] == 0x7f && bytes[1] == 'E' && bytes[2] == 'L' && bytes[3] == 'F';
    return fatbin || elf ? noBinary : invalidImage;
  }
  text += sizeof magic - 1;
  size_t length = 0;
  while (length < 100 && text[length] != '\n' && text[length] != 0) length++;
  auto module = std::make_unique<Module>();
  module->name.assign(text, length);
  for (Kernel* k = kernels; k; k = k->next) {
    if (module->name != k->module) continue;
    auto function = std::make_unique<Function>(Function{k, 0});
    functions.insert(function.get());
    module->functions[k->name] = std::move(function);
  }
  if (module->functions.empty()) {
    recordRefusal("module %s: the emulator's library has no kernel of it; run scripts/build-emulator.mjs", module->name.c_str());
    return noBinary;
  }
  modules.insert(module.get());
  *handle = module.release();
  return ok;
}
EMU_EXPORT int cuModuleUnload(void* handle) {
  ENTER("cuModuleUnload");
  if (!modules.count((Module*)handle)) return invalidHandle;
  const Status status = runEverything();
  for (auto& [_, function] : ((Module*)handle)->functions) functions.erase(function.get());
  modules.erase((Module*)handle);
  delete (Module*)handle;
  return status;
}
EMU_EXPORT int cuModuleGetFunction(void** handle, void* module, const char* name) {
  ENTER("cuModuleGetFunction");
  if (!modules.count((Module*)module)) return invalidHandle;
  const auto found = ((Module*)module)->functions.find(name);
  if (found == ((Module*)module)->functions.end()) return notFound;
  *handle = found->second.get();
  return ok;
}
EMU_EXPORT int cuFuncSetAttribute(void* handle, int attribute, int value) {
  ENTER("cuFuncSetAttribute");
  Function* function = functionOf(handle);
  if (!function) return invalidHandle;
  if (attribute == 9) return ok;  // share of the cache
  if (attribute != 8 || value < 0 || (uint32_t)value + function->kernel->staticShared > maxShared()) return invalidValue;
  function->maxDynamicShared = (uint32_t)value;
  return ok;
}
EMU_EXPORT int cuFuncGetAttribute(int* value, int attribute, void* handle) {
  ENTER("cuFuncGetAttribute");
  Function* function = functionOf(handle);
  if (!function) return invalidHandle;
  switch (attribute) {
    case 0: *value = function->kernel->maxThreads; return ok;
    case 1: *value = (int)function->kernel->staticShared; return ok;
    case 4: *value = 32; return ok;  // registers
    case 5: case 6: *value = capability(); return ok;
    case 8: *value = function->maxDynamicShared ? (int)function->maxDynamicShared : (48 << 10) - (int)function->kernel->staticShared; return ok;
    default: *value = 0; return attribute > 0 && attribute < 16 ? ok : invalidValue;
  }
}
EMU_EXPORT int cuLaunchKernel(void* handle, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX, unsigned blockY, unsigned blockZ,
                              unsigned shared, void* streamHandle, void** parameters, void** extra) {
  ENTER("cuLaunchKernel");
  Function* function = functionOf(handle);
  Stream* stream = streamOf(streamHandle);
  if (!function || !stream) return invalidHandle;
  Operation op = operation(Operation::launch, "cuLaunchKernel");
  const void* buffer = nullptr;
  size_t bytes = packedBytes(*function->kernel);
  if (parameters) {
    if (extra) return invalidValue;
    op.data = packArguments(*function->kernel, parameters);
  } else if (unpackExtra(extra, &buffer, &bytes) != ok) {
    return invalidValue;
  }
  op.function = function;
  op.grid = {gridX, gridY, gridZ};
  op.block = {blockX, blockY, blockZ};
  op.dynamicShared = shared;
  if (const Status status = checkLaunch(*function, op.grid, op.block, shared, bytes); status != ok) return status;
  if (!parameters) op.data.assign((const char*)buffer, (const char*)buffer + bytes);
  return enqueue(*stream, std::move(op));
}

// --- errors ---

namespace {
struct Name {
  int status;
  const char *name, *text;
};
constexpr Name names[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};
}  // namespace
EMU_EXPORT int cuGetErrorName(int status, const char** text) {
  *text = nullptr;
  for (const Name& name : names)
    if (name.status == status) *text = name.name;
  return *text ? ok : invalidValue;
}
EMU_EXPORT int cuGetErrorString(int status, const char** text) {
  *text = nullptr;
  for (const Name& name : names)
    if (name.status == status) *text = name.text;
  return *text ? ok : invalidValue;
}
