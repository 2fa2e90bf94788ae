// For emulated libraries beside the driver (cublas-lt.cc): what real ones have from driver and device.
#include "entry.h"

using namespace emu;

/// Before each of its calls: the driver's state, and what a test wants the call to fail with (moe_emulator_fail), or 0.
EMU_EXPORT int moe_emulator_enter(const char* call, int* wanted) {
  std::lock_guard guard{lock};
  *wanted = injectedFailure(call);
  return Entry("").status;
}

/// The device whose context is current, or -1.
EMU_EXPORT int moe_emulator_device() { return current ? deviceOf(current) : -1; }

/// Queues `work` with a copy of its arguments; in a capture it becomes a node. What it returns is a status of the driver; `ofRanks` if that may be that it
/// waits for another rank.
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

/// Whether device memory may be read, or written, by work that runs. Otherwise a fault is recorded.
EMU_EXPORT int moe_emulator_access(const char* call, uintptr_t address, size_t bytes, int writes) {
  return writes ? hostWrite(address, bytes, call) : hostRead(address, bytes, call);
}

/// Why a call was refused, for the report.
EMU_EXPORT void moe_emulator_refuse(const char* reason) {
  std::lock_guard guard{lock};
  recordRefusal("%s", reason);
}
