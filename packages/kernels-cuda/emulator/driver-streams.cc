// The driver API: streams and events.
#include "entry.h"

using namespace emu;

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
  const Status found = runAll(*stream), status = found == notReady ? ok : found;
  removeStream(stream);
  return status;
}
EMU_EXPORT int cuStreamSynchronize(void* handle) {
  ENTER("cuStreamSynchronize");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (stream->capture) return breakCapture(*stream);
  return waitFor([&] { return runAll(*stream); });
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
  if (stream->capture) {
    if (event->second->captured) return ok;
    recordRefusal("cuStreamWaitEvent: a stream that is being captured would wait for an event that was recorded outside of the capture");
    stream->captureBroken = true;
    return captureIsolation;
  }
  if (event->second->captured) return captureUnsupported;
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
  if (stream->owner && stream->owner != event->second->owner) {
    recordRefusal("cuEventRecord: an event of device %d on a stream of device %d", deviceOf(event->second->owner), deviceOf(stream->owner));
    return invalidHandle;
  }
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
  return waitFor([&] { return runThrough(*event->second->stream, event->second->recorded); });
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
