/** @file The context in which everything happens. */
import { MoeError } from '@moe/core'
import type { Driver } from './driver.ts'
import { status } from './status.ts'

/** The device's primary context, which other libraries of the process share. Several backends take turns in being current. */
export class Context {
  static #current = 0
  readonly #driver: Driver
  readonly #ordinal: number
  readonly #handle: number
  #retained = true

  constructor(driver: Driver, ordinal: number) {
    this.#driver = driver
    this.#ordinal = ordinal
    const device = driver.out(word => driver.call.cuDeviceGet(word, ordinal), 'kernels-cuda')
    const word = new BigUint64Array(1)
    const code = driver.call.cuDevicePrimaryCtxRetain(word, device)
    // Somebody else has the device for himself, or its memory is full: another backend may do.
    if (code !== status.success) throw unusable(driver, code, ordinal)
    this.#handle = Number(word[0])
    // Not by `use`: the number may be that of a context that is gone.
    driver.check(driver.call.cuCtxSetCurrent(this.#handle), 'kernels-cuda')
    Context.#current = this.#handle
  }

  /** Whether it is open: afterwards its handles may be those of nothing, which drivers do not always notice. */
  get open(): boolean {
    return this.#retained
  }

  /** @throws MoeError E_DISPOSED after `release` */
  use(): void {
    if (!this.#retained)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cuda', problem: 'the backend is disposed' })
    if (Context.#current === this.#handle) return
    this.#driver.check(this.#driver.call.cuCtxSetCurrent(this.#handle), 'kernels-cuda')
    Context.#current = this.#handle
  }

  release(): void {
    if (!this.#retained) return
    this.#retained = false
    this.#driver.call.cuDevicePrimaryCtxRelease(this.#ordinal)
  }
}

function unusable(driver: Driver, code: number, ordinal: number): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'kernels-cuda',
    problem: `device ${ordinal} cannot be used: the driver says ${driver.errorName(code)} (${code})`,
    fix: `see with nvidia-smi who uses it, choose another with MOE_CUDA_DEVICE, or use @moe/kernels-cpu`,
  })
}
