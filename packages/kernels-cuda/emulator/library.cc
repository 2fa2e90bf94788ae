// What the emulated libraries other than the driver (cublas-lt.cc, nccl.cc) need of the driver and the device.
#include "entry.h"

using namespace emu;

/// Called at the start of each of their calls. Returns the driver's state; `wanted` is the failure that a test has
/// injected (moe_emulator_fail), or 0.
EMU_EXPORT int moe_emulator_enter(const char* call, int* wanted) {
  std::lock_guard guard{lock};
  *wanted = injectedFailure(call);
  return Entry("").status;
}

/// The device whose context is current, or -1.
EMU_EXPORT int moe_emulator_device() { return current ? deviceOf(current) : -1; }

/// Queues `work` with a copy of its arguments; in a capture, it becomes a node. `work` returns a status of the driver.
/// `ofRanks`: whether it may wait for another rank.
EMU_EXPORT int moe_emulator_work(const char* call, int (*work)(const void* arguments), const void* arguments, size_t bytes, void* handle, int ofRanks) {
  ENTER("moe_emulator_work");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  Operation op = operation(Operation::work, call);
  op.perform = work;
  op.ofRanks = ofRanks != 0;
  op.data.assign((const char*)arguments, (const char*)arguments + bytes);
  return enqueue(*stream, std::move(op));
}

/// True if running work may read (or write) this device memory. Otherwise a fault is recorded.
EMU_EXPORT int moe_emulator_access(const char* call, uintptr_t address, size_t bytes, int writes) {
  return writes ? hostWrite(address, bytes, call) : hostRead(address, bytes, call);
}

/// Adds the reason why a call was refused to the report.
EMU_EXPORT void moe_emulator_refuse(const char* reason) {
  std::lock_guard guard{lock};
  recordRefusal("%s", reason);
}
