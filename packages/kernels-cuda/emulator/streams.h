// Streams, events and graphs: queues of operations, which run as late as possible.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "runtime.h"

namespace emu {

/// A device's primary context, whose handle is its address.
struct Primary {
  int retained = 0;
};
constexpr int mostDevices = 8;
extern Primary primaries[mostDevices];
/// The context that is current on the calling thread, or null. Everything a thread creates belongs to it.
extern thread_local Primary* current;
inline int deviceOf(const Primary* owner) { return (int)(owner - primaries); }

struct Function {
  Kernel* kernel;
  uint32_t maxDynamicShared;  // as requested, or 0
  Primary* owner = current;
};

struct Event {
  Primary* owner = current;
  uint64_t recorded = 0, done = 0;  // sequence numbers of the latest record: requested and completed
  struct Stream* stream = nullptr;
  double seconds = 0;
  bool timed = true;
  bool asked = false;     // a query has returned "not ready" since the latest record
  bool captured = false;  // its latest record was captured into a graph
};

struct Operation {
  enum Kind { launch, copyIn, copyOut, copyWithin, fill, allocate, release, mark, record, wait, work } kind;
  const char* call;
  // launch
  Function* function = nullptr;
  Dim3 grid{}, block{};
  uint32_t dynamicShared = 0;
  std::vector<char> data;  // packed arguments, or the contents of a pageable upload at the time of the call
  // work of another library, with a copy of its arguments in `data`
  int (*perform)(const void* arguments) = nullptr;
  bool ofRanks = false;  // it may wait for another rank
  // copies, fills, allocations
  uintptr_t to = 0, from = 0;
  size_t bytes = 0, capacity = 0;
  uint32_t value = 0, width = 0;
  // events
  std::shared_ptr<Event> event;
  Stream* stream = nullptr;
  uint64_t until = 0;

  uint64_t sequence = 0;
  // For queries of a graph about this node.
  void* extra[5] = {};
  size_t extraBytes = 0;
};

struct Graph {
  Primary* owner = current;
  std::vector<std::unique_ptr<Operation>> nodes;
};

struct GraphExec {
  Primary* owner;
  std::vector<Operation> operations;
  std::map<const Operation*, size_t> indexOf;
};

struct Stream {
  Primary* owner = current;
  std::deque<Operation> queue;
  bool blocking = true;  // synchronizes with the null stream
  bool asked = false;
  std::unique_ptr<Graph> capture;
  bool captureBroken = false;
  bool captureRelaxed = false;
};

/// Everything a process has on its devices. Never destroyed, because kernels may run until the end.
struct Context {
  Status error = ok;  // sticky
  bool lazy = true;
  bool readsHost = false;  // copies can also access ordinary host memory
  bool idle = false;       // launches, fills and device copies are checked but not executed
  Stream null;
  std::set<Stream*> streams;
  std::map<Event*, std::shared_ptr<Event>> events;
  std::map<uintptr_t, size_t> pinned;
  std::map<uintptr_t, Primary*> owners;  // of pinned and device memory
  uint64_t sequence = 0;
  int failLaunchAfter = 0;
  Status failLaunch = ok;
};
Context& context();

/// Queues an operation (or adds it to the graph that the stream is capturing).
Status enqueue(Stream& stream, Operation operation);
/// Runs a stream's operations up to a sequence number. Returns `notReady` if work of another library waits for another
/// process.
Status runThrough(Stream& stream, uint64_t sequence);
Status runAll(Stream& stream);
/// Runs all operations in the streams of the current context.
Status runEverything();
/// Repeats `run` until it is ready, for calls that wait.
Status waitFor(const std::function<Status()>& run);
Status waitForEverything();
Stream* streamOf(void* handle);
/// Destroys an empty stream. Other streams no longer wait for it.
void removeStream(Stream* stream);
/// True if a stream of the current context contains work that waits for other ranks.
bool waitsForRanks();

}  // namespace emu
