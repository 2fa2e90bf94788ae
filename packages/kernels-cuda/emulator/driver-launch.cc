// The driver API: modules, kernels and their arguments, launches.
#include "entry.h"

namespace emu {
Kernel* kernels;
void registerKernel(Kernel* kernel) {
  kernel->next = kernels;
  kernels = kernel;
}
}  // namespace emu

using namespace emu;

namespace {

struct Module {
  Primary* owner = current;
  std::string name;
  std::map<std::string, std::unique_ptr<Function>> functions;
};
std::set<Module*> modules;
std::set<Function*> functions;

size_t packedBytes(const Kernel& kernel) {
  size_t at = 0;
  for (const Parameter* p = kernel.parameters; p->letter; p++) at = (at + p->align - 1) / p->align * p->align + p->size;
  return at;
}

std::string signatureOf(const Kernel& kernel) {
  std::string text;
  for (const Parameter* p = kernel.parameters; p->letter; p++) {
    if (!text.empty()) text += ' ';
    text += p->letter;
    if (p->count) text += "[" + std::to_string(p->count) + "]";
  }
  return text;
}

/// Packs arguments that are passed by address.
std::vector<char> packArguments(const Kernel& kernel, void** addresses) {
  std::vector<char> packed(packedBytes(kernel));
  size_t at = 0;
  for (const Parameter* p = kernel.parameters; p->letter; p++, addresses++) {
    at = (at + p->align - 1) / p->align * p->align;
    memcpy(packed.data() + at, *addresses, p->size);
    at += p->size;
  }
  return packed;
}

}  // namespace

namespace emu {

Status unpackExtra(void** extra, const void** buffer, size_t* bytes) {
  *buffer = nullptr;
  *bytes = 0;
  if (!extra) return invalidValue;
  for (; *extra; extra += 2) {
    if (*extra == (void*)1) *buffer = extra[1];
    else if (*extra == (void*)2) *bytes = *(size_t*)extra[1];
    else return invalidValue;
  }
  return *buffer || *bytes == 0 ? ok : invalidValue;
}

Status checkLaunch(const Function& function, Dim3 grid, Dim3 block, uint32_t shared, size_t bytes) {
  const Kernel& kernel = *function.kernel;
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    recordRefusal("%s: a grid of %u x %u x %u blocks", kernel.name, grid.x, grid.y, grid.z);
    return invalidValue;
  }
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) {
    recordRefusal("%s: blocks of %u x %u x %u threads", kernel.name, block.x, block.y, block.z);
    return invalidValue;
  }
  if (threads > (uint64_t)kernel.maxThreads) {
    recordRefusal("%s: blocks of %u threads, its launch bounds allow %d", kernel.name, (unsigned)threads, kernel.maxThreads);
    return outOfResources;
  }
  // Without the attribute, static and dynamic shared memory are limited to 48 KiB together.
  const size_t allowed = function.maxDynamicShared > 0 ? function.maxDynamicShared : (48 << 10) - kernel.staticShared;
  if (shared > allowed || kernel.staticShared + shared > maxShared()) {
    recordRefusal("%s: %u bytes of dynamic shared memory; its attribute allows %zu, the device %u with %zu static ones", kernel.name, shared, allowed, maxShared(),
                  kernel.staticShared);
    return invalidValue;
  }
  if (bytes != packedBytes(kernel)) {
    recordRefusal("%s: %zu bytes of arguments, its parameters (%s) take %zu", kernel.name, bytes, signatureOf(kernel).c_str(),
                  packedBytes(kernel));
    return invalidValue;
  }
  return ok;
}

Function* functionOf(void* handle) { return functions.count((Function*)handle) ? (Function*)handle : nullptr; }

static void unload(Module* module) {
  for (auto& [_, function] : module->functions) functions.erase(function.get());
  modules.erase(module);
  delete module;
}

void unloadModules(const Primary* owner) {
  const std::set<Module*> all = modules;
  for (Module* module : all)
    if (module->owner == owner) unload(module);
}

/// Loading code may wait for all of the context's work ("Lazy Loading", in the CUDA programming guide), and does where that waits for other ranks.
static Status waitToLoad() { return waitsForRanks() ? waitForEverything() : ok; }

}  // namespace emu

EMU_EXPORT const char* moe_emulator_kernels() {
  std::lock_guard guard{lock};
  static std::string text;
  text.clear();
  for (const Kernel* k = kernels; k; k = k->next)
    text += std::string(k->module) + " " + k->name + " " + std::to_string(k->maxThreads) + " " + signatureOf(*k) + "\n";
  return text.c_str();
}
EMU_EXPORT int cuModuleLoadData(void** handle, const void* image) {
  ENTER("cuModuleLoadData");
  // As long as the header of a real image, and no longer: images need not end in a zero byte.
  static const char magic[] = "moe-emulated-module ";
  const char* text = (const char*)image;
  for (size_t i = 0; i + 1 < sizeof magic; i++) {
    if (text[i] == magic[i]) continue;
    const unsigned char* bytes = (const unsigned char*)image;
    const bool fatbin = bytes[0] == 0x50 && bytes[1] == 0xed && bytes[2] == 0x55 && bytes[3] == 0xba;
    const bool elf = bytes[0] == 0x7f && bytes[1] == 'E' && bytes[2] == 'L' && bytes[3] == 'F';
    return fatbin || elf ? noBinary : invalidImage;
  }
  text += sizeof magic - 1;
  size_t length = 0;
  while (length < 100 && text[length] != '\n' && text[length] != 0) length++;
  auto module = std::make_unique<Module>();
  module->name.assign(text, length);
  // Machine code for a single architecture.
  const std::string only = "-sm90a";
  if (module->name.size() > only.size() && module->name.compare(module->name.size() - only.size(), only.size(), only) == 0 && capability() != 90) return noBinary;
  for (Kernel* k = kernels; k; k = k->next) {
    if (module->name != k->module) continue;
    auto function = std::make_unique<Function>(Function{k, 0, current});
    functions.insert(function.get());
    module->functions[k->name] = std::move(function);
  }
  if (module->functions.empty()) {
    recordRefusal("module %s: the emulator's library has no kernel of it; run scripts/build-emulator.mjs", module->name.c_str());
    return noBinary;
  }
  modules.insert(module.get());
  *handle = module.release();
  return waitToLoad();
}
EMU_EXPORT int cuModuleUnload(void* handle) {
  ENTER("cuModuleUnload");
  if (!modules.count((Module*)handle)) return invalidHandle;
  const Status status = waitForEverything();
  unload((Module*)handle);
  return status;
}
EMU_EXPORT int cuModuleGetFunction(void** handle, void* module, const char* name) {
  ENTER("cuModuleGetFunction");
  if (!modules.count((Module*)module)) return invalidHandle;
  const auto found = ((Module*)module)->functions.find(name);
  if (found == ((Module*)module)->functions.end()) return notFound;
  *handle = found->second.get();
  return waitToLoad();
}
EMU_EXPORT int cuFuncSetAttribute(void* handle, int attribute, int value) {
  ENTER("cuFuncSetAttribute");
  Function* function = functionOf(handle);
  if (!function) return invalidHandle;
  if (attribute == 9) return ok;  // the preferred shared memory carveout
  if (attribute != 8 || value < 0 || (uint32_t)value + function->kernel->staticShared > maxShared()) return invalidValue;
  function->maxDynamicShared = (uint32_t)value;
  return ok;
}
EMU_EXPORT int cuFuncGetAttribute(int* value, int attribute, void* handle) {
  ENTER("cuFuncGetAttribute");
  Function* function = functionOf(handle);
  if (!function) return invalidHandle;
  switch (attribute) {
    case 0: *value = function->kernel->maxThreads; return ok;
    case 1: *value = (int)function->kernel->staticShared; return ok;
    case 4: *value = 32; return ok;  // registers
    case 5: case 6: *value = capability(); return ok;
    case 8: *value = function->maxDynamicShared ? (int)function->maxDynamicShared : (48 << 10) - (int)function->kernel->staticShared; return ok;
    default: *value = 0; return attribute > 0 && attribute < 16 ? ok : invalidValue;
  }
}
EMU_EXPORT int cuLaunchKernel(void* handle, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX, unsigned blockY, unsigned blockZ,
                              unsigned shared, void* streamHandle, void** parameters, void** extra) {
  ENTER("cuLaunchKernel");
  Function* function = functionOf(handle);
  Stream* stream = streamOf(streamHandle);
  if (!function || !stream) return invalidHandle;
  if (function->owner != current || (stream->owner && stream->owner != current)) {
    recordRefusal("%s: of device %d, on a stream of device %d, while the context of device %d is current", function->kernel->name, deviceOf(function->owner),
                  deviceOf(stream->owner ? stream->owner : current), deviceOf(current));
    return invalidHandle;
  }
  Operation op = operation(Operation::launch, "cuLaunchKernel");
  const void* buffer = nullptr;
  size_t bytes = packedBytes(*function->kernel);
  if (parameters) {
    if (extra) return invalidValue;
    op.data = packArguments(*function->kernel, parameters);
  } else if (unpackExtra(extra, &buffer, &bytes) != ok) {
    return invalidValue;
  }
  op.function = function;
  op.grid = {gridX, gridY, gridZ};
  op.block = {blockX, blockY, blockZ};
  op.dynamicShared = shared;
  if (const Status status = checkLaunch(*function, op.grid, op.block, shared, bytes); status != ok) return status;
  if (!parameters) op.data.assign((const char*)buffer, (const char*)buffer + bytes);
  return enqueue(*stream, std::move(op));
}
