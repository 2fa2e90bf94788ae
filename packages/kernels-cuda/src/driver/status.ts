/** @file Status codes of the driver as errors of this project: what failed, and what can be done about it. */
import { MoeError } from '@moe/core'

/** The CUresult values that are told apart. */
export const status = {
  success: 0,
  outOfMemory: 2,
  noDevice: 100,
  noBinaryForGpu: 209,
  notReady: 600,
} as const

/** What to do, where that is known. */
export const fixes: Readonly<Record<number, string>> = {
  2: 'make the batch smaller or free tensors that are no longer needed',
  3: 'install or restart the NVIDIA driver',
  34: 'the library found is a stub for linking: put the one of the installed driver first on LD_LIBRARY_PATH',
  46: 'wait for the other process, or set the compute mode of the device back to DEFAULT',
  100: 'check `nvidia-smi` and CUDA_VISIBLE_DEVICES',
  101: 'check `nvidia-smi` and CUDA_VISIBLE_DEVICES',
  200: 'the kernels are damaged: install the package again, or run `node scripts/build-fatbins.mjs`',
  209: 'the kernels were not built for this device: run `node scripts/build-fatbins.mjs --arch=…` for its architecture',
  218: 'the kernels need a newer driver: update it',
  222: 'the kernels need a newer driver: update it',
  802: "the devices are not ready: where NVSwitch joins them, start the fabric manager (nvidia-fabricmanager) of the driver's version",
  803: 'the driver and its kernel module differ in version: restart the machine',
  804: 'the libraries of cuda-compat do not serve this device: take them off LD_LIBRARY_PATH, and update the driver',
  999: 'see `dmesg` for the reason; restarting the process or the driver may help',
}

/** After these the context is gone: nothing on the device can be used any more by this process. */
export const fatal: ReadonlySet<number> = new Set([
  214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911,
])

/** @param report What the emulator has seen, if it is one. */
export function driverError(op: string, code: number, name: string, context: string, report: string): MoeError {
  const where = context === '' ? '' : ` ${context}`
  if (code === status.outOfMemory) {
    return new MoeError({
      code: 'E_OUT_OF_MEMORY',
      op,
      problem: `the device has no memory left${where}`,
      fix: fixes[2],
    })
  }
  const lost = fatal.has(code)
  const fix = lost
    ? 'the device is lost to this process: restart it and go on from the last checkpoint'
    : (fixes[code] ?? 'see the driver documentation of this status')
  return new MoeError({
    code: 'E_BACKEND',
    op,
    problem: `the driver says ${name} (${code})${where}${report === '' ? '' : `\n${report}`}`,
    fix,
    details: { status: code, name, lost },
  })
}
