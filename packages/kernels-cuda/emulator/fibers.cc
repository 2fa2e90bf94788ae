// Fibers: stacks and the switch between them.
#include "runtime.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#if !defined(__x86_64__) && !defined(__aarch64__)
#define EMU_UCONTEXT
#include <ucontext.h>
#endif

namespace emu {

uintptr_t stacksStart, stacksBytes;

namespace {
constexpr size_t pageBytes = 4096;
constexpr size_t stackBytes = 64 << 10;
constexpr size_t strideBytes = stackBytes + pageBytes;
}  // namespace

void reserveStacks() {
  if (stacksStart) return;
  stacksBytes = maxThreads * strideBytes;
  void* at = mmap(nullptr, stacksBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) abort();
  stacksStart = (uintptr_t)at;
  for (int i = 0; i < maxThreads; i++) mprotect((char*)at + i * strideBytes, pageBytes, PROT_NONE);
}

/// The top of a stack. Tops are staggered: at equal distances, the active ends of all stacks would map to the same few
/// cache sets.
static uintptr_t stackTop(int index) {
  const uintptr_t end = stacksStart + (index + 1) * strideBytes;
  return (end - (size_t)index * 1088 % 16384 - 64) & ~(uintptr_t)63;
}

#if defined(__x86_64__)

asm(R"(
.text
.p2align 4
.type emuSwitch, @function
emuSwitch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emuSwitch, .-emuSwitch
)");
extern "C" void emuSwitch(void** save, void* load) __attribute__((visibility("hidden")));
void switchContext(void** save, void* load) { emuSwitch(save, load); }

void* freshContext(int index, void (*entry)()) {
  void** frame = (void**)stackTop(index);
  *--frame = nullptr;  // where `entry` would return to; it never does
  *--frame = (void*)entry;
  for (int i = 0; i < 6; i++) *--frame = nullptr;
  return frame;
}

#elif defined(__aarch64__)

asm(R"(
.text
.p2align 4
.type emuSwitch, %function
emuSwitch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emuSwitch, .-emuSwitch
)");
extern "C" void emuSwitch(void** save, void* load) __attribute__((visibility("hidden")));
void switchContext(void** save, void* load) { emuSwitch(save, load); }

void* freshContext(int index, void (*entry)()) {
  void** frame = (void**)(stackTop(index) - 160);
  memset(frame, 0, 160);
  frame[11] = (void*)entry;  // x30
  return frame;
}

#else

void switchContext(void** save, void* load) {
  ucontext_t mine;
  *save = &mine;
  swapcontext(&mine, (ucontext_t*)load);
}

void* freshContext(int index, void (*entry)()) {
  char* low = (char*)stacksStart + index * strideBytes + pageBytes;
  ucontext_t* context = (ucontext_t*)low;
  getcontext(context);
  context->uc_stack.ss_sp = low + sizeof(ucontext_t);
  context->uc_stack.ss_size = stackTop(index) - (uintptr_t)(low + sizeof(ucontext_t));
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#endif

// Signals.

namespace {
constexpr int handledSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction previous[4];
pthread_t kernelThread;
char* signalStack;
constexpr size_t signalStackBytes = 64 << 10;

void onSignal(int signal, siginfo_t* info, void*) {
  if (run.active && pthread_equal(pthread_self(), kernelThread)) {
    const uintptr_t at = (uintptr_t)info->si_addr;
    // SA_NODEFER leaves the signal unblocked, so this stack can be abandoned safely.
    if (signal == SIGFPE) stop(launchFailed, {nullptr, 0}, "integer division by zero or overflow");
    if (at - stacksStart < stacksBytes)
      stop(launchFailed, {nullptr, 0}, "stack overflow (%zu KiB a thread)", stackBytes >> 10);
    stop(illegalAddress, {nullptr, 0}, "access to 0x%zx, which is not device memory (signal %d)", (size_t)at, signal);
  }
  // Not from the emulator's thread: handle it as if the emulator had no handler.
  for (int i = 0; i < 4; i++) {
    if (handledSignals[i] != signal) continue;
    sigaction(signal, &previous[i], nullptr);
    raise(signal);
  }
}
}  // namespace

void withSignals(void (*body)()) {
  if (!signalStack)
    signalStack = (char*)mmap(nullptr, signalStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  kernelThread = pthread_self();
  stack_t stack{}, before{};
  stack.ss_sp = signalStack;
  stack.ss_size = signalStackBytes;
  sigaltstack(&stack, &before);
  struct sigaction action{};
  action.sa_sigaction = onSignal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; i++) sigaction(handledSignals[i], &action, &previous[i]);
  body();
  for (int i = 0; i < 4; i++) sigaction(handledSignals[i], &previous[i], nullptr);
  sigaltstack(&before, nullptr);
}

}  // namespace emu
