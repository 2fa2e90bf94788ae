/** @file Status codes of the driver and the errors they become, with fixes where one is known. */
import { MoeError } from '@moe/core'

/** The CUresult values that the code distinguishes. */
export const status = {
  success: 0,
  outOfMemory: 2,
  noDevice: 100,
  noBinaryForGpu: 209,
  notReady: 600,
} as const

/** Fixes for statuses, where one is known. */
export const fixes: Readonly<Record<number, string>> = {
  2: 'use a smaller batch or free tensors that are no longer needed',
  3: 'install or restart the NVIDIA driver',
  34: 'this library is a stub for linking: put the library of the installed driver first in LD_LIBRARY_PATH',
  46: 'wait for the other process, or reset the compute mode of the device to DEFAULT',
  100: 'check `nvidia-smi` and CUDA_VISIBLE_DEVICES',
  101: 'check `nvidia-smi` and CUDA_VISIBLE_DEVICES',
  200: 'the kernels are corrupt: reinstall the package, or run `node scripts/build-fatbins.mjs`',
  209: 'the kernels were not built for this device: run `node scripts/build-fatbins.mjs --arch=…` for its architecture',
  218: 'the kernels need a newer driver: update it',
  222: 'the kernels need a newer driver: update it',
  802: "the devices are not ready: if they are connected by NVSwitch, start the fabric manager (nvidia-fabricmanager) of the driver's version",
  803: 'the driver and its kernel module differ in version: reboot the machine',
  804: 'the cuda-compat libraries do not support this device: remove them from LD_LIBRARY_PATH and update the driver',
  999: 'check `dmesg` for the cause; restarting the process or the driver may help',
}

/** After one of these the context is unusable: this process can no longer use the device. */
export const fatal: ReadonlySet<number> = new Set([
  214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911,
])

/** @param report the emulator's report, empty with a real driver */
export function driverError(op: string, code: number, name: string, context: string, report: string): MoeError {
  const where = context === '' ? '' : ` ${context}`
  if (code === status.outOfMemory) {
    return new MoeError({
      code: 'E_OUT_OF_MEMORY',
      op,
      problem: `the device is out of memory${where}`,
      fix: fixes[2],
    })
  }
  const lost = fatal.has(code)
  const fix = lost
    ? 'this process can no longer use the device: restart it and resume from the last checkpoint'
    : (fixes[code] ?? 'see this status in the CUDA driver API documentation')
  return new MoeError({
    code: 'E_BACKEND',
    op,
    problem: `the driver reports ${name} (${code})${where}${report === '' ? '' : `\n${report}`}`,
    fix,
    details: { status: code, name, lost },
  })
}
