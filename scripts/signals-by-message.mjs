// Preloaded by programs that tests start on Windows, where a process cannot send another a signal that it can handle. A message with the
// signal's name is used instead.
if (process.channel) {
  process.on('message', name => process.emit(name, name))
  process.channel.unref()
}
