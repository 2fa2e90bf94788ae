// The prologue of every call of the driver API, and what its parts share.
#pragma once
#include <mutex>

#include "streams.h"

namespace emu {

extern std::recursive_mutex lock;

/// Constructed by every call: takes the lock, and checks the sticky error and injected failures.
struct Entry {
  std::lock_guard<std::recursive_mutex> guard{lock};
  Status status = ok;
  explicit Entry(const char* call, bool needsContext = true, const char* group = nullptr);
};
#define ENTER(...)                \
  Entry entry(__VA_ARGS__);       \
  if (entry.status != ok) return entry.status

/// The failure that a test has injected for this call, once; 0 for none.
int injectedFailure(const char* call);

/// Ends the capture of a stream after a call that a capture forbids.
Status breakCapture(Stream& stream);
Operation operation(Operation::Kind kind, const char* call);

/// Compute capability times ten.
int capability();
/// True if a capture forbids calls that may wait for the device (a capture in relaxed mode does not).
bool captureForbids();

// Kernels and their arguments.

/// Unloads the modules of a context that is destroyed.
void unloadModules(const Primary* owner);
Function* functionOf(void* handle);
Status checkLaunch(const Function& function, Dim3 grid, Dim3 block, uint32_t shared, size_t bytes);
Status unpackExtra(void** extra, const void** buffer, size_t* bytes);

}  // namespace emu
