// The driver API: graphs. Captures a stream's operations, and queues them again as a whole.
#include "entry.h"

using namespace emu;

namespace {
std::set<Graph*> graphs;
std::set<GraphExec*> execs;

struct KernelNodeParams {
  void* func;
  uint32_t grid[3], block[3], shared;
  void** kernelParams;
  void** extra;
  void *kern, *ctx;
};
}  // namespace

EMU_EXPORT int cuStreamBeginCapture_v2(void* handle, int mode) {
  ENTER("cuStreamBeginCapture");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  if (stream == &context().null) return captureUnsupported;
  if (stream->capture) return invalidValue;
  stream->capture = std::make_unique<Graph>();
  stream->captureBroken = false;
  stream->captureRelaxed = mode == 2;
  return ok;
}
EMU_EXPORT int cuStreamEndCapture(void* handle, void** graph) {
  ENTER("cuStreamEndCapture");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  *graph = nullptr;
  if (!stream->capture) return invalidValue;
  std::unique_ptr<Graph> captured = std::move(stream->capture);
  if (stream->captureBroken) return captureInvalidated;
  graphs.insert(captured.get());
  *graph = captured.release();
  return ok;
}
EMU_EXPORT int cuStreamIsCapturing(void* handle, int* status) {
  ENTER("cuStreamIsCapturing");
  Stream* stream = streamOf(handle);
  if (!stream) return invalidHandle;
  *status = !stream->capture ? 0 : stream->captureBroken ? 2 : 1;
  return ok;
}
EMU_EXPORT int cuGraphInstantiateWithFlags(void** handle, void* graph, unsigned long long) {
  ENTER("cuGraphInstantiateWithFlags");
  if (!graphs.count((Graph*)graph)) return invalidValue;
  auto exec = std::make_unique<GraphExec>();
  exec->owner = ((Graph*)graph)->owner;
  for (const auto& node : ((Graph*)graph)->nodes) {
    exec->indexOf[node.get()] = exec->operations.size();
    exec->operations.push_back(*node);
  }
  execs.insert(exec.get());
  *handle = exec.release();
  return ok;
}
EMU_EXPORT int cuGraphLaunch(void* handle, void* streamHandle) {
  ENTER("cuGraphLaunch");
  Stream* stream = streamOf(streamHandle);
  if (!execs.count((GraphExec*)handle) || !stream) return invalidHandle;
  const Primary* const owner = ((GraphExec*)handle)->owner;
  if (stream->owner && stream->owner != owner) {
    recordRefusal("cuGraphLaunch: a graph of device %d on a stream of device %d", deviceOf(owner), deviceOf(stream->owner));
    return invalidHandle;
  }
  for (const Operation& op : ((GraphExec*)handle)->operations)
    if (const Status status = enqueue(*stream, op); status != ok) return status;
  return ok;
}
EMU_EXPORT int cuGraphExecDestroy(void* handle) {
  ENTER("cuGraphExecDestroy");
  if (!execs.erase((GraphExec*)handle)) return invalidValue;
  delete (GraphExec*)handle;
  return ok;
}
EMU_EXPORT int cuGraphDestroy(void* handle) {
  ENTER("cuGraphDestroy");
  if (!graphs.erase((Graph*)handle)) return invalidValue;
  delete (Graph*)handle;
  return ok;
}
EMU_EXPORT int cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
  ENTER("cuGraphGetNodes");
  if (!graphs.count((Graph*)handle)) return invalidValue;
  size_t n = 0;
  for (const auto& node : ((Graph*)handle)->nodes) {
    if (node->kind == Operation::mark) continue;  // internal: not a node type of the driver
    if (nodes && n < *count) nodes[n] = node.get();
    n++;
  }
  if (!nodes || n < *count) *count = n;
  return ok;
}
static Operation* nodeOf(void* handle) {
  for (Graph* graph : graphs)
    for (const auto& node : graph->nodes)
      if (node.get() == handle) return node.get();
  return nullptr;
}
EMU_EXPORT int cuGraphNodeGetType(void* handle, int* type) {
  ENTER("cuGraphNodeGetType");
  const Operation* node = nodeOf(handle);
  if (!node) return invalidValue;
  *type = node->kind == Operation::launch || node->kind == Operation::work ? 0 : node->kind == Operation::fill ? 2 : node->kind <= Operation::copyWithin ? 1 : 5;
  return ok;
}
EMU_EXPORT int cuGraphKernelNodeGetParams_v2(void* handle, KernelNodeParams* params) {
  ENTER("cuGraphKernelNodeGetParams_v2");
  Operation* node = nodeOf(handle);
  if (!node || node->kind != Operation::launch) return invalidValue;
  node->extraBytes = node->data.size();
  node->extra[0] = (void*)1;
  node->extra[1] = node->data.data();
  node->extra[2] = (void*)2;
  node->extra[3] = &node->extraBytes;
  node->extra[4] = nullptr;
  *params = {node->function,
             {node->grid.x, node->grid.y, node->grid.z},
             {node->block.x, node->block.y, node->block.z},
             node->dynamicShared,
             nullptr,
             node->extra,
             nullptr,
             nullptr};
  return ok;
}
EMU_EXPORT int cuGraphExecKernelNodeSetParams_v2(void* handle, void* node, const KernelNodeParams* params) {
  ENTER("cuGraphExecKernelNodeSetParams_v2");
  if (!execs.count((GraphExec*)handle)) return invalidValue;
  GraphExec& exec = *(GraphExec*)handle;
  const auto found = exec.indexOf.find((Operation*)node);
  Function* function = functionOf(params->func);
  if (found == exec.indexOf.end() || !function || exec.operations[found->second].kind != Operation::launch) return invalidValue;
  const void* buffer;
  size_t bytes;
  if (params->kernelParams || unpackExtra(params->extra, &buffer, &bytes) != ok) return invalidValue;
  const Dim3 grid{params->grid[0], params->grid[1], params->grid[2]}, block{params->block[0], params->block[1], params->block[2]};
  if (const Status status = checkLaunch(*function, grid, block, params->shared, bytes); status != ok) return status;
  Operation& op = exec.operations[found->second];
  op.function = function;
  op.grid = grid;
  op.block = block;
  op.dynamicShared = params->shared;
  op.data.assign((const char*)buffer, (const char*)buffer + bytes);
  return ok;
}
