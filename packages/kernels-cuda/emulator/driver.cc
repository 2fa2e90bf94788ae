// The driver API: what every call starts with, device and context, and the emulator's settings for tests.
#include <stdio.h>
#include <stdlib.h>

#include "entry.h"

namespace emu {
std::recursive_mutex lock;
}  // namespace emu

using namespace emu;

namespace {

bool initialized;
int devices = 1;
std::map<std::string, std::pair<int, int>> injected;  // injected failures by call: which of the following calls fails, and how

int capabilityNow;

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
  for (const auto& [address, _] : std::map<uintptr_t, Primary*>(all.owners))
    if (!all.pinned.count(address)) all.owners.erase(address);
  freeEverything();
}

/// A context is destroyed with its last owner, along with everything created in it. Later uses of its handles are
/// reported, where a driver may crash.
void closeContext(Primary* owner) {
  Context& all = context();
  for (Stream* stream : std::set<Stream*>(all.streams))
    if (stream->owner == owner) removeStream(stream);
  for (const auto& [handle, event] : std::map<Event*, std::shared_ptr<Event>>(all.events))
    if (event->owner == owner) all.events.erase(handle);
  for (const auto& [address, of] : std::map<uintptr_t, Primary*>(all.owners)) {
    if (of != owner) continue;
    if (all.pinned.erase(address)) free((void*)address);
    else closeAllocation(address);
    all.owners.erase(address);
  }
  unloadModules(owner);
  for (const Primary& other : primaries)
    if (other.retained > 0) return;
  all.null.queue.clear();
  freeEverything();
}

}  // namespace

namespace emu {

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

bool captureForbids() {
  for (Stream* stream : context().streams)
    if (stream->capture && !stream->captureRelaxed) return true;
  return false;
}

Entry::Entry(const char* call, bool needsContext, const char* group) {
  if (!initialized) status = notInitialized;
  else if (needsContext && (!current || current->retained == 0)) {
    status = invalidContext;
    recordRefusal("%s without a context that is current on this thread", call);
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
EMU_EXPORT void moe_emulator_fail(const char* call, int after, int status) {
  std::lock_guard guard{lock};
  if (strcmp(call, "launch") == 0) {
    context().failLaunchAfter = after;
    context().failLaunch = (Status)status;
  } else {
    injected[call] = {after, status};
  }
}
/// Sets "readsHost", "idle", "devices" (one by default), "checks", "lazy", "reversed", "fp8Bits", "approximate",
/// "deviceSums" and "capability", overriding the environment variables. Checks can only be switched on after a reset,
/// because what happened without them was not tracked.
EMU_EXPORT void moe_emulator_set(const char* name, int value) {
  std::lock_guard guard{lock};
  cuInit(0);
  if (strcmp(name, "lazy") == 0) context().lazy = value != 0;
  if (strcmp(name, "readsHost") == 0) context().readsHost = value != 0;
  if (strcmp(name, "reversed") == 0) reversed = value != 0;
  if (strcmp(name, "idle") == 0) context().idle = value != 0;
  if (strcmp(name, "fp8Bits") == 0) fp8Bits = value;
  if (strcmp(name, "approximate") == 0) approximate = value;
  if (strcmp(name, "deviceSums") == 0) deviceSums = value;
  if (strcmp(name, "capability") == 0) capabilityNow = value;
  if (strcmp(name, "devices") == 0) devices = value < mostDevices ? value : mostDevices;
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
    const char* bits = getenv("MOE_EMULATOR_FP8_BITS");
    fp8Bits = bits ? atoi(bits) : 0;
    const char* off = getenv("MOE_EMULATOR_APPROXIMATE");
    approximate = off && strcmp(off, "1") == 0;
    const char* sums = getenv("MOE_EMULATOR_DEVICE_SUMS");
    deviceSums = sums && strcmp(sums, "1") == 0;
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
  *count = devices;
  return ok;
}
EMU_EXPORT int cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet", false);
  *device = ordinal;
  return ordinal >= 0 && ordinal < devices ? ok : invalidDevice;
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
    case 1: case 2: case 3: *value = 1024; break;  // maximum threads of a block, its x and y
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;  // maximum grid
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
EMU_EXPORT int cuDevicePrimaryCtxRetain(void** handle, int device) {
  ENTER("cuDevicePrimaryCtxRetain", false);
  if (device < 0 || device >= devices) return invalidDevice;
  primaries[device].retained++;
  *handle = &primaries[device];
  return ok;
}
EMU_EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER("cuDevicePrimaryCtxRelease_v2", false);
  if (device < 0 || device >= mostDevices) return invalidDevice;
  Primary& owner = primaries[device];
  if (owner.retained == 0) return invalidContext;
  if (--owner.retained == 0) closeContext(&owner);
  return ok;
}
EMU_EXPORT int cuCtxSetCurrent(void* handle) {
  ENTER("cuCtxSetCurrent", false);
  Primary* const wanted = (Primary*)handle;
  if (wanted && (wanted < primaries || wanted >= primaries + mostDevices || wanted->retained == 0)) return invalidContext;
  current = wanted;
  return ok;
}
EMU_EXPORT int cuCtxGetCurrent(void** handle) {
  ENTER("cuCtxGetCurrent", false);
  *handle = current;
  return ok;
}
EMU_EXPORT int cuCtxSynchronize() {
  ENTER("cuCtxSynchronize");
  if (captureForbids()) return captureUnsupported;
  return waitForEverything();
}
