// Loaded before a program that a test starts on Windows, where no process can send another a signal that it may answer: a message
// with the name of one stands for it.
if (process.channel) {
  process.on('message', name => process.emit(name, name))
  process.channel.unref()
}
