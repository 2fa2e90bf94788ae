// What every call of the driver API begins with, and what its parts share.
#pragma once
#include <mutex>

#include "streams.h"

namespace emu {

extern std::recursive_mutex lock;

/// Every call: the lock, the sticky error, an injected failure.
struct Entry {
  std::lock_guard<std::recursive_mutex> guard{lock};
  Status status = ok;
  explicit Entry(const char* call, bool needsContext = true, const char* group = nullptr);
};
#define ENTER(...)                \
  Entry entry(__VA_ARGS__);       \
  if (entry.status != ok) return entry.status

/// What a test wants this call to fail with, once; 0 for nothing.
int injectedFailure(const char* call);

/// A call that may not happen while its stream captures ends the capture.
Status breakCapture(Stream& stream);
Operation operation(Operation::Kind kind, const char* call);

/// Compute capability times ten.
int capability();
/// Whether a capture forbids calls that may wait for the device (one in relaxed mode does not).
bool captureForbids();

// Kernels and their arguments.

/// With a context all of its modules go.
void unloadModules(const Primary* owner);
Function* functionOf(void* handle);
Status checkLaunch(const Function& function, Dim3 grid, Dim3 block, uint32_t shared, size_t bytes);
Status unpackExtra(void** extra, const void** buffer, size_t* bytes);

}  // namespace emu
