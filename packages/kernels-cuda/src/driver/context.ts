/** @file The CUDA context. */
import { MoeError } from '@moe/core'
import type { Driver } from './driver.ts'
import { status } from './status.ts'

/** The device's primary context, which other libraries in the process share. Several backends may alternate in making theirs current. */
export class Context {
  static #current = 0
  readonly #driver: Driver
  readonly #device: number
  readonly #handle: number
  #retained = true

  constructor(driver: Driver, ordinal: number) {
    this.#driver = driver
    this.#device = driver.out(word => driver.call.cuDeviceGet(word, ordinal), 'kernels-cuda')
    const word = new BigUint64Array(1)
    const code = driver.call.cuDevicePrimaryCtxRetain(word, this.#device)
    // Another process has exclusive use of the device, or its memory is full: another backend may work.
    if (code !== status.success) throw unusable(driver, code, ordinal)
    this.#handle = Number(word[0])
    // Not with `use`: a context that is gone may have had the same handle.
    driver.check(driver.call.cuCtxSetCurrent(this.#handle), 'kernels-cuda')
    Context.#current = this.#handle
  }

  /** Whether it has not been released. After release its handles may be invalid, which drivers do not always detect. */
  get open(): boolean {
    return this.#retained
  }

  /** @throws MoeError E_DISPOSED after `release` */
  use(): void {
    if (!this.#retained)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cuda', problem: 'the backend has been disposed' })
    if (Context.#current === this.#handle) return
    this.#driver.check(this.#driver.call.cuCtxSetCurrent(this.#handle), 'kernels-cuda')
    Context.#current = this.#handle
  }

  release(): void {
    if (!this.#retained) return
    this.#retained = false
    this.#driver.call.cuDevicePrimaryCtxRelease(this.#device)
  }
}

function unusable(driver: Driver, code: number, ordinal: number): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'kernels-cuda',
    problem: `device ${ordinal} cannot be used: the driver reports ${driver.errorName(code)} (${code})`,
    fix: `check with nvidia-smi which process uses it, choose another device with MOE_CUDA_DEVICE, or use @moe/kernels-cpu`,
  })
}
