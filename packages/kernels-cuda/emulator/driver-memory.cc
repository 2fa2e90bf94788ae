// The driver API: memory, copies and fills.
#include <stdlib.h>

#include "entry.h"

using namespace emu;

namespace {

bool isPinned(const void* pointer, size_t bytes) {
  const auto next = context().pinned.upper_bound((uintptr_t)pointer);
  if (next == context().pinned.begin()) return false;
  const auto& [start, length] = *std::prev(next);
  return (uintptr_t)pointer + bytes <= start + length;
}

}  // namespace

static Status allocateBytes(uintptr_t* address, size_t bytes) {
  if (bytes == 0) return invalidValue;
  *address = reserveAllocation(bytes);
  if (!*address) {
    // Operations waiting in queues may free some.
    if (const Status status = waitForEverything(); status != ok) return status;
    *address = reserveAllocation(bytes);
  }
  if (*address) context().owners[*address] = current;
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
  // Freeing waits for the device's work, as in the driver.
  const Status status = waitForEverything();
  closeAllocation(address);
  context().owners.erase(address);
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
  context().owners.erase(address);
  Operation op = operation(Operation::release, "cuMemFreeAsync");
  op.to = address;
  return enqueue(*stream, std::move(op));
}
EMU_EXPORT int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  ENTER("cuMemHostAlloc", true, "alloc");
  *pointer = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
  if (!*pointer) return outOfMemory;
  context().pinned[(uintptr_t)*pointer] = bytes;
  context().owners[(uintptr_t)*pointer] = current;
  return ok;
}
EMU_EXPORT int cuMemFreeHost(void* pointer) {
  ENTER("cuMemFreeHost");
  if (!context().pinned.count((uintptr_t)pointer)) return invalidValue;
  const Status status = waitForEverything();
  context().pinned.erase((uintptr_t)pointer);
  context().owners.erase((uintptr_t)pointer);
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
  // A copy to pageable memory has completed when the call returns.
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
  if (to < from + bytes && from < to + bytes) {
    recordRefusal("cuMemcpyDtoDAsync: %zu bytes from 0x%zx to 0x%zx, which overlap", bytes, (size_t)from, (size_t)to);
    return invalidValue;
  }
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
