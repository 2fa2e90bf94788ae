#include "streams.h"

#include <time.h>
#include <unistd.h>

namespace emu {

Context& context() {
  static Context* all = new Context;
  return *all;
}

Primary primaries[mostDevices];
thread_local Primary* current;

Stream* streamOf(void* handle) {
  // 1 and 2 name the legacy and the per-thread default stream.
  if ((uintptr_t)handle <= 2) return &context().null;
  return context().streams.count((Stream*)handle) ? (Stream*)handle : nullptr;
}

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static Status perform(Operation& op) {
  Context& all = context();
  if (all.idle && (op.kind == Operation::launch || op.kind == Operation::fill || op.kind == Operation::copyWithin)) return ok;
  switch (op.kind) {
    case Operation::launch:
      if (all.failLaunchAfter > 0 && --all.failLaunchAfter == 0) return all.failLaunch;
      return runKernel(op.function->kernel, op.grid, op.block, op.dynamicShared, op.data.data());
    case Operation::work:
      if (all.failLaunchAfter > 0 && --all.failLaunchAfter == 0) return all.failLaunch;
      return (Status)op.perform(op.data.data());
    case Operation::copyIn:
      if (!hostWrite(op.to, op.bytes, op.call)) return illegalAddress;
      memcpy((void*)op.to, op.from ? (const void*)op.from : op.data.data(), op.bytes);
      return ok;
    case Operation::copyOut:
      if (!hostRead(op.from, op.bytes, op.call)) return illegalAddress;
      memcpy((void*)op.to, (const void*)op.from, op.bytes);
      return ok;
    case Operation::copyWithin:
      if (!hostRead(op.from, op.bytes, op.call) || !hostWrite(op.to, op.bytes, op.call)) return illegalAddress;
      memmove((void*)op.to, (const void*)op.from, op.bytes);
      return ok;
    case Operation::fill:
      if (!hostWrite(op.to, op.bytes, op.call)) return illegalAddress;
      if (op.width == 1) memset((void*)op.to, (int)op.value, op.bytes);
      else
        for (size_t i = 0; i < op.bytes; i += op.width) memcpy((char*)op.to + i, &op.value, op.width);
      return ok;
    case Operation::allocate: openAllocation(op.to); return ok;
    case Operation::release: closeAllocation(op.to); return ok;
    case Operation::mark: markMemory(op.to, op.bytes, op.capacity); return ok;
    case Operation::record:
      op.event->done = op.sequence;
      op.event->seconds = now();
      return ok;
    case Operation::wait: return op.stream ? runThrough(*op.stream, op.until) : ok;
  }
  return ok;
}

static void fail(Status status) {
  Context& all = context();
  all.error = status;
  all.null.queue.clear();
  for (Stream* stream : all.streams) stream->queue.clear();
}

Status runThrough(Stream& stream, uint64_t sequence) {
  Context& all = context();
  while (all.error == ok && !stream.queue.empty() && stream.queue.front().sequence <= sequence) {
    Operation op = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (&stream == &all.null) {
      for (Stream* other : all.streams)
        if (other->blocking) runThrough(*other, op.sequence);
    } else if (stream.blocking) {
      runThrough(all.null, op.sequence);
    }
    if (all.error != ok) break;
    const Status status = perform(op);
    if (status == notReady) {
      stream.queue.push_front(std::move(op));
      return notReady;
    }
    if (status != ok && all.error == ok) fail(status);
  }
  return all.error;
}

Status runAll(Stream& stream) { return runThrough(stream, ~(uint64_t)0); }

Status runEverything() {
  bool waits = runAll(context().null) == notReady;
  for (Stream* stream : context().streams)
    if (stream->owner == current) waits |= runAll(*stream) == notReady;
  return context().error != ok ? context().error : waits ? notReady : ok;
}

Status waitFor(const std::function<Status()>& run) {
  for (int tries = 0; tries < 20000; tries++) {
    if (const Status status = run(); status != notReady) return status;
    usleep(1000);
  }
  recordRefusal("a wait for work that waits for another rank did not end in 20 s");
  fail(launchFailed);
  return launchFailed;
}

void removeStream(Stream* stream) {
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
}

bool waitsForRanks() {
  for (const Stream* stream : context().streams) {
    if (stream->owner != current) continue;
    for (const Operation& op : stream->queue)
      if (op.kind == Operation::work && op.ofRanks) return true;
  }
  return false;
}

Status waitForEverything() { return waitFor(runEverything); }

Status enqueue(Stream& stream, Operation operation) {
  if (stream.capture) {
    stream.capture->nodes.push_back(std::make_unique<Operation>(std::move(operation)));
    return ok;
  }
  Context& all = context();
  operation.sequence = ++all.sequence;
  if (operation.kind == Operation::record) {
    operation.event->recorded = operation.sequence;
    operation.event->stream = &stream;
    operation.event->asked = false;
    operation.event->captured = false;
  }
  stream.asked = false;
  stream.queue.push_back(std::move(operation));
  if (!all.lazy || stream.queue.size() > 4096) {
    if (const Status status = runAll(stream); status != notReady) return status;
  }
  return ok;
}

}  // namespace emu
