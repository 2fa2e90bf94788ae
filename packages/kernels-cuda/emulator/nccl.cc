// NCCL without a GPU: a separate library that queues messages in the emulated driver's streams. Ranks may be in one
// process or in several on this machine; a message is a file. It implements point-to-point messages between two ranks,
// no collectives, and nonblocking communicators: a call returns before its work is in the stream, and calls on a
// communicator that is not ready are refused, as by the real library. What would hang or overwrite data there is a
// fault here.
#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "library.h"

namespace {

/// ncclResult_t of nccl.h 2.30.
enum Result { success = 0, unhandledCudaError = 1, systemError = 2, invalidArgument = 4, invalidUsage = 5, inProgress = 7 };
/// Statuses of the driver: work that waits for another rank, and a failed launch.
enum { notReady = 600, launchFailed = 719 };

constexpr size_t idBytes = 128;
struct Id {
  char folder[idBytes];
};
/// The part of ncclConfig_t that exists since version 2.18.
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking, cgaClusterSize, minCTAs, maxCTAs;
  const char* netName;
  int splitShare;
};
/// NCCL_CONFIG_UNDEF_INT: the default.
constexpr int undefinedNumber = INT_MIN;

struct Comm;
struct Message {
  bool sends, done;
  int peer;
  uint64_t number;
  uintptr_t address;
  size_t bytes;
};
/// The operations of a group on one communicator.
struct Batch {
  Comm* comm;
  void* stream;
  std::vector<Message> messages;
};
struct Comm {
  std::string folder;
  int ranks, rank;
  bool met = false;    // all ranks have connected
  int state = inProgress;
  bool ended = false;  // finalized
  std::vector<uint64_t> sent, received;
  std::vector<Batch*> waiting;  // waiting to be put into their streams
  int queued = 0;               // in streams
  bool gone = false;            // destroyed or aborted; the last batch frees it
};

int living = 0, ids = 0, depth = 0;
std::vector<std::string> folders;  // of the ids created by this process
std::vector<Batch*> group;

int enter(const char* call) {
  int wanted;
  const int state = moe_emulator_enter(call, &wanted);
  return wanted != 0 ? wanted : state == 0 ? success : unhandledCudaError;
}

std::string placeOf(const Comm& comm, int from, int to, uint64_t number) {
  return comm.folder + "/" + std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(number);
}
std::string arrivalOf(const Comm& comm, int rank) { return comm.folder + "/came-" + std::to_string(rank); }
/// The process and device of a rank, stored in the file that announces it.
struct Location {
  int process, device;
  bool operator==(const Location& other) const { return process == other.process && device == other.device; }
};
std::string departureOf(const Comm& comm, int rank) { return comm.folder + "/left-" + std::to_string(rank); }

bool write(const std::string& place, const void* data, size_t bytes) {
  const std::string unfinished = place + "+";
  FILE* file = fopen(unfinished.c_str(), "wb");
  if (!file) return false;
  const bool whole = fwrite(data, 1, bytes, file) == bytes;
  return fclose(file) == 0 && whole && rename(unfinished.c_str(), place.c_str()) == 0;
}

/// True if the message has arrived; `status` is set if it is not what was expected.
bool take(const Comm& comm, const Message& message, int* status) {
  const std::string place = placeOf(comm, message.peer, comm.rank, message.number);
  struct stat found;
  if (stat(place.c_str(), &found) != 0) return false;
  FILE* file = fopen(place.c_str(), "rb");
  if ((size_t)found.st_size != message.bytes)
    *status = refuse(launchFailed, "nccl: rank %d sends %zu bytes where rank %d takes %zu", message.peer, (size_t)found.st_size, comm.rank, message.bytes);
  else if (!moe_emulator_access("ncclRecv", message.address, message.bytes, 1)) *status = launchFailed;
  else if (!file || fread((void*)message.address, 1, message.bytes, file) != message.bytes) *status = refuse(launchFailed, "nccl: %s cannot be read", place.c_str());
  if (file) fclose(file);
  unlink(place.c_str());
  return true;
}

/// Checks that ranks of one process use different devices. Other processes have their own emulated devices.
int checkLocations(const Comm& comm) {
  std::vector<Location> locations((size_t)comm.ranks);
  for (int rank = 0; rank < comm.ranks; rank++) {
    FILE* file = fopen(arrivalOf(comm, rank).c_str(), "rb");
    if (!file || fread(&locations[(size_t)rank], 1, sizeof(Location), file) != sizeof(Location)) locations[(size_t)rank] = {-1, rank};
    if (file) fclose(file);
    for (int other = 0; other < rank; other++)
      if (locations[(size_t)other] == locations[(size_t)rank])
        return refuse(invalidUsage, "ncclCommInitRankConfig: ranks %d and %d are on one device", other, rank);
  }
  return success;
}

void release(Comm* comm) {
  if (comm->gone && comm->queued == 0) delete comm;
}

/// Runs in a stream, repeatedly while messages are missing.
int carry(const void* argument) {
  Batch* batch;
  memcpy(&batch, argument, sizeof batch);
  Comm* comm = batch->comm;
  int status = 0;
  bool waits = false;
  for (Message& message : batch->messages) {
    if (comm->gone) break;
    if (message.done || !message.sends || status != 0) continue;
    if (!moe_emulator_access("ncclSend", message.address, message.bytes, 0)) status = launchFailed;
    else if (!write(placeOf(*comm, comm->rank, message.peer, message.number), (const void*)message.address, message.bytes))
      status = refuse(launchFailed, "nccl: %s cannot be written", comm->folder.c_str());
    message.done = true;
  }
  for (Message& message : batch->messages) {
    if (comm->gone) break;
    if (message.done || message.sends || status != 0) continue;
    message.done = take(*comm, message, &status);
    waits |= !message.done;
  }
  if (status == 0 && waits) return notReady;
  comm->queued--;
  release(comm);
  delete batch;
  return status;
}

int addMessage(const char* call, bool sends, uintptr_t address, size_t count, int type, int peer, Comm* comm, void* stream) {
  if (const int status = enter(call); status != success) return status;
  if (!comm) return invalidArgument;
  if (comm->state != success) return refuse(invalidArgument, "%s: the communicator is not ready", call);
  if (type != 1) return refuse(invalidArgument, "%s: of types only bytes are emulated", call);
  if (peer < 0 || peer >= comm->ranks || peer == comm->rank) return refuse(invalidArgument, "%s: rank %d with rank %d of %d", call, comm->rank, peer, comm->ranks);
  if (count == 0) return refuse(invalidArgument, "%s: no bytes", call);
  if (depth == 0) return refuse(invalidUsage, "%s outside of a group is not emulated", call);
  Batch* batch = nullptr;
  for (Batch* other : group)
    if (other->comm == comm) batch = other;
  if (!batch) group.push_back(batch = new Batch{comm, stream, {}});
  if (batch->stream != stream) return refuse(invalidUsage, "%s: two streams in one group are not emulated", call);
  uint64_t& number = (sends ? comm->sent : comm->received)[(size_t)peer];
  batch->messages.push_back({sends, false, peer, number++, address, count});
  return success;
}

void removeFolder(const std::string& folder) {
  if (DIR* entries = opendir(folder.c_str())) {
    while (const dirent* entry = readdir(entries))
      if (entry->d_name[0] != '.') unlink((folder + "/" + entry->d_name).c_str());
    closedir(entries);
  }
  rmdir(folder.c_str());
}

void leave(Comm* comm) {
  write(departureOf(*comm, comm->rank), "", 0);
  // The last rank removes the files, because others may not yet have seen that all have connected.
  bool last = true;
  for (int rank = 0; rank < comm->ranks; rank++) last &= access(departureOf(*comm, rank).c_str(), F_OK) == 0;
  if (last) removeFolder(comm->folder);
  for (Batch* batch : comm->waiting) delete batch;
  comm->waiting.clear();
  comm->gone = true;
  living--;
  release(comm);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int ncclGetVersion(int* version) {
  *version = 23007;
  return success;
}
EXPORT const char* ncclGetErrorString(int result) {
  switch (result) {
    case success: return "no error";
    case unhandledCudaError: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case systemError: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case invalidArgument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case invalidUsage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case inProgress: return "NCCL operation in progress";
    default: return "unknown result code";
  }
}
EXPORT int ncclGetUniqueId(Id* id) {
  if (const int status = enter("ncclGetUniqueId"); status != success) return status;
  memset(id, 0, sizeof *id);
  snprintf(id->folder, idBytes, "%s/moe-nccl-%d-%d", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", (int)getpid(), ids++);
  if (mkdir(id->folder, 0700) != 0) return systemError;
  folders.push_back(id->folder);
  return success;
}
EXPORT int ncclCommInitRankConfig(Comm** comm, int ranks, Id id, int rank, const Config* config) {
  if (const int status = enter("ncclCommInitRankConfig"); status != success) return status;
  if (!comm || ranks < 1 || rank < 0 || rank >= ranks) return invalidArgument;
  if (!config || config->magic != 0xcafebeef || config->size < sizeof(Config) || config->version < 21800)
    return refuse(invalidArgument, "ncclCommInitRankConfig: the configuration is not of version 2.18 or later");
  if (config->blocking != 0) return refuse(invalidArgument, "ncclCommInitRankConfig: communicators that block are not emulated");
  // Zeros in place of defaults are rejected there, or change how many blocks and clusters it uses.
  for (const int number : {config->cgaClusterSize, config->minCTAs, config->maxCTAs, config->splitShare})
    if (number != undefinedNumber) return refuse(invalidArgument, "ncclCommInitRankConfig: of the configuration only defaults are emulated");
  if (config->netName) return refuse(invalidArgument, "ncclCommInitRankConfig: networks are not emulated");
  Comm* fresh = new Comm{};
  fresh->folder = id.folder;
  fresh->ranks = ranks;
  fresh->rank = rank;
  fresh->sent.resize((size_t)ranks);
  fresh->received.resize((size_t)ranks);
  const Location place{(int)getpid(), moe_emulator_device()};
  if (access(arrivalOf(*fresh, rank).c_str(), F_OK) == 0 || !write(arrivalOf(*fresh, rank), &place, sizeof place)) {
    delete fresh;
    return refuse(invalidArgument, "ncclCommInitRankConfig: rank %d exists already, or %s does not", rank, id.folder);
  }
  living++;
  *comm = fresh;
  return inProgress;
}
EXPORT int ncclCommGetAsyncError(Comm* comm, int* state) {
  if (!comm || !state) return invalidArgument;
  if (const int failed = enter("ncclCommGetAsyncError"); failed != success) {
    *state = comm->state = failed;
    return success;
  }
  if (!comm->met) {
    comm->met = true;
    for (int rank = 0; rank < comm->ranks; rank++) comm->met &= access(arrivalOf(*comm, rank).c_str(), F_OK) == 0;
    if (comm->met) comm->state = checkLocations(*comm);
  } else if (comm->state == inProgress) {
    // Now the requested operations are put into the streams.
    comm->state = success;
    for (Batch* batch : comm->waiting) {
      comm->queued++;
      if (moe_emulator_work("NCCL", carry, &batch, sizeof batch, batch->stream, 1) != 0) comm->state = unhandledCudaError;
    }
    comm->waiting.clear();
  }
  *state = comm->state;
  return success;
}
EXPORT const char* ncclGetLastError(Comm*) { return ""; }
EXPORT int ncclGroupStart() {
  if (const int status = enter("ncclGroupStart"); status != success) return status;
  depth++;
  return success;
}
EXPORT int ncclSend(uintptr_t from, size_t count, int type, int peer, Comm* comm, void* stream) {
  return addMessage("ncclSend", true, from, count, type, peer, comm, stream);
}
EXPORT int ncclRecv(uintptr_t to, size_t count, int type, int peer, Comm* comm, void* stream) {
  return addMessage("ncclRecv", false, to, count, type, peer, comm, stream);
}
EXPORT int ncclGroupEnd() {
  if (depth == 0) return refuse(invalidUsage, "ncclGroupEnd without a start");
  const int status = enter("ncclGroupEnd");
  if (--depth > 0) return status;
  const bool any = !group.empty();
  for (Batch* batch : group) {
    if (status != success) {
      delete batch;
      continue;
    }
    batch->comm->waiting.push_back(batch);
    batch->comm->state = inProgress;
  }
  group.clear();
  return status != success ? status : any ? inProgress : success;
}
EXPORT int ncclCommFinalize(Comm* comm) {
  if (const int status = enter("ncclCommFinalize"); status != success) return status;
  if (!comm || comm->ended) return invalidArgument;
  if (comm->state != success) return refuse(invalidArgument, "ncclCommFinalize: the communicator is not ready");
  comm->ended = true;
  comm->state = inProgress;
  return inProgress;
}
EXPORT int ncclCommDestroy(Comm* comm) {
  if (const int status = enter("ncclCommDestroy"); status != success) return status;
  if (!comm) return success;
  if (!comm->ended || comm->state != success) return refuse(invalidArgument, "ncclCommDestroy: the communicator is not finalized, so this would wait for the other ranks");
  if (comm->queued > 0) refuse(0, "ncclCommDestroy: messages are in flight");
  leave(comm);
  return success;
}
EXPORT int ncclCommAbort(Comm* comm) {
  if (comm) leave(comm);
  return success;
}

// --- for tests ---

/// The number of communicators that have not been destroyed.
EXPORT int moe_nccl_living() { return living; }
/// Removes messages that failed ranks have left behind. No messages may be in flight.
EXPORT void moe_nccl_reset() {
  for (const std::string& folder : folders) removeFolder(folder);
  folders.clear();
}
