// What the emulated libraries other than the driver (cublas-lt.cc, nccl.cc) need of the driver. Implemented in
// library.cc, in the driver's library.
#pragma once
#include <stdarg.h>
#include <stdio.h>

#include "abi.h"

extern "C" int moe_emulator_enter(const char* call, int* wanted);
extern "C" int moe_emulator_device();
extern "C" int moe_emulator_work(const char* call, int (*work)(const void*), const void* arguments, size_t bytes, void* stream, int ofRanks);
extern "C" int moe_emulator_access(const char* call, uintptr_t address, size_t bytes, int writes);
extern "C" void moe_emulator_refuse(const char* reason);

/// Adds a reason to the report. @returns the status
static int refuse(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));
static int refuse(int status, const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  moe_emulator_refuse(text);
  return status;
}
