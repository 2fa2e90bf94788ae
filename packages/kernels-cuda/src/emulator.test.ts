/** @file Tests of the emulator through the driver API: correct kernels give correct results, and every kind of error is reported. */
import koffi from 'koffi'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { openEmulator, unbuilt } from './test-emulator.ts'

const illegalAddress = 700
const misalignedAddress = 716
const launchFailed = 719

describe.skipIf(unbuilt)('emulator', () => {
  const device = openEmulator()
  beforeEach(() => device.reset())
  afterEach(() => device.reset())

  const numbers = (n: number, f = (i: number) => i) => Float32Array.from({ length: n }, (_, i) => f(i))
  /** Runs a kernel with one block and returns status and report. */
  const run = (name: string, block: number, signature: string, args: readonly number[], shared = 0) => {
    const launched = device.launch(name, 1, block, signature, args, { shared })
    return { status: launched || device.synchronize(), report: device.report() }
  }

  describe('runs correct kernels:', () => {
    test('grids and blocks in three dimensions', () => {
      const y = device.allocate(4 * 12 * 24)
      expect(device.launch('moe_test_indices', [2, 3, 2], [4, 2, 3], 'p', [y])).toBe(0)
      const values = device.download(y, Int32Array, 12 * 24)
      for (let i = 0; i < values.length; i++) expect(values[i]).toBe(Math.floor(i / 24) * 10000 + (i % 24))
    })

    test('a block reduction with shared memory, barriers and shuffles', () => {
      const x = numbers(4 * 300, i => Math.sin(i))
      const y = device.allocate(4 * x.length)
      expect(device.launch('moe_test_softmax', 4, 256, 'p p i', [y, device.upload(x), 300])).toBe(0)
      const values = device.download(y, Float32Array, x.length)
      for (let row = 0; row < 4; row++) {
        const exps = Array.from(x.subarray(300 * row, 300 * row + 300), Math.exp)
        const sum = exps.reduce((a, b) => a + b)
        for (const [i, e] of exps.entries()) expect(values[300 * row + i]).toBeCloseTo(e / sum, 6)
      }
      expect(device.report()).toBe('')
    })

    test('shuffles, votes and barriers that reduce', () => {
      const y = device.allocate(4 * 512)
      expect(run('moe_test_shuffles', 64, 'p', [y])).toEqual({ status: 0, report: '' })
      const values = device.download(y, Int32Array, 512)
      const expected = (f: (lane: number, first: number, i: number) => number) =>
        Int32Array.from({ length: 64 }, (_, i) => f(i % 32, i - (i % 32), i))
      const part = (k: number) => values.subarray(64 * k, 64 * k + 64)
      const thirds = (first: number) => {
        let votes = 0
        for (let lane = 0; lane < 32; lane++) if ((first + lane) % 3 === 0) votes |= 1 << lane
        return votes
      }
      expect(part(0)).toEqual(expected((_, first) => first + 3))
      expect(part(1)).toEqual(expected((lane, first) => first + (lane ^ 5)))
      expect(part(2)).toEqual(expected((lane, _, i) => (lane < 2 ? i : i - 2)))
      expect(part(3)).toEqual(expected((lane, _, i) => (lane > 29 ? i : i + 2)))
      expect(part(4)).toEqual(expected((_, __, i) => i ^ 1))
      expect(part(5)).toEqual(expected((_, first) => thirds(first)))
      expect(part(6)).toEqual(expected((_, first) => (first === 0 ? 2 : 1)))
      expect(part(7)).toEqual(expected(() => 132))
    })

    test('reductions of lanes have the bits of their shuffles', () => {
      const x = numbers(64, i => Math.sin(i) * 10 ** (i % 7))
      const y = device.allocate(4 * 12 * 64)
      expect(run('moe_test_joins', 64, 'p p', [y, device.upload(x)])).toEqual({ status: 0, report: '' })
      const values = device.download(y, Float32Array, 12 * 64)
      expect(values.subarray(0, 6 * 64)).toEqual(values.subarray(6 * 64))
      const largest = (from: number) => Math.max(...x.subarray(from, from + 4))
      for (let i = 0; i < 64; i++) expect(values[5 * 64 + i]).toBe(largest(i - (i % 4)))
      expect(new Set(values.subarray(0, 32)).size).toBe(1)
    })

    test('atomics in shared and global memory, and the last block', () => {
      const x = Int32Array.from({ length: 1000 }, (_, i) => (i * i) % 13)
      const y = device.upload(new Int32Array(17))
      expect(
        device.launch('moe_test_atomics', 3, 128, 'p p p i', [
          y,
          device.upload(new Int32Array(1)),
          device.upload(x),
          1000,
        ]),
      ).toBe(0)
      const bins = new Int32Array(17)
      for (const value of x) bins[value]++
      bins[16] = 1000
      expect(device.download(y, Int32Array, 17)).toEqual(bins)
    })

    test('arguments of every type', () => {
      const y = device.allocate(20)
      const x = device.upload(numbers(1, () => 7))
      expect(run('moe_test_arguments', 32, 'p i l f i i i p p', [y, -3, 2 ** 24, 0.5, 1, 2, 3, y, x])).toEqual({
        status: 0,
        report: '',
      })
      expect([...device.download(y, Float32Array, 5)]).toEqual([-3, 2 ** 24, 0.5, 321, 7])
      expect(device.kernels()).toContain('emulator-tests moe_test_arguments 32 p i l f i[3] p[2]\n')
    })

    test.each([
      ['bf16', 16],
      ['tf32', 8],
    ])('a %s product of fragments', (kind, depth) => {
      // The numbers have so few bits that both formats and every order of summation are exact.
      const a = numbers(16 * depth, i => ((i * 7) % 17) - 8)
      const b = numbers(depth * 8, i => ((i * 5) % 13) - 6)
      const d = device.allocate(4 * 128)
      expect(run(`moe_test_${kind}_product`, 32, 'p p p', [d, device.upload(a), device.upload(b)])).toEqual({
        status: 0,
        report: '',
      })
      const values = device.download(d, Float32Array, 128)
      for (let i = 0; i < 16; i++)
        for (let j = 0; j < 8; j++) {
          let sum = kind === 'bf16' ? 1 : 0
          for (let k = 0; k < depth; k++) sum += a[i * depth + k] * b[k * 8 + j]
          expect(values[8 * i + j]).toBe(sum)
        }
    })

    test('a block reduction in reverse order of blocks and threads, with the same result', () => {
      const x = device.upload(numbers(4 * 300, i => Math.sin(i)))
      const results = [0, 1].map(reversed => {
        device.set('reversed', reversed)
        const y = device.allocate(4 * 4 * 300)
        expect(device.launch('moe_test_softmax', 4, 256, 'p p i', [y, x, 300])).toBe(0)
        return device.download(y, Float32Array, 4 * 300)
      })
      device.set('reversed', 0)
      expect(results[1]).toEqual(results[0])
    })

    test('writes of different threads to halves and bytes of a word, without reporting a race', () => {
      const y = device.allocate(1024)
      expect(run('moe_test_shared_halves', 256, 'p', [y])).toEqual({ status: 0, report: '' })
      expect(device.download(y, Float32Array, 256).every(value => value === 255)).toBe(true)
    })
  })

  describe('faults and errors:', () => {
    const expectFault = (result: { status: number; report: string }, status: number, ...parts: readonly string[]) => {
      expect(result.report).not.toBe('')
      for (const part of parts) expect(result.report).toContain(part)
      expect(result.status).toBe(status)
    }

    test('an access out of bounds is reported with its source line', () => {
      const x = device.upload(numbers(100))
      const result = run('moe_test_past_the_end', 256, 'p p i', [device.allocate(400), x, 100])
      expectFault(
        result,
        illegalAddress,
        'out of bounds: read of 4 bytes',
        '0 bytes past the end of the 400 bytes',
        'thread (100, 0, 0)',
        'moe_test_past_the_end',
        'block (0, 0, 0)',
      )
    })
    test('an access before the start of a buffer is reported', () =>
      expectFault(
        run('moe_test_before_the_start', 256, 'p p', [device.allocate(1024), device.upload(numbers(256))]),
        illegalAddress,
        '4 bytes before the 1024 bytes',
      ))
    test('a null pointer is reported', () =>
      expectFault(run('moe_test_null', 256, 'p', [0]), illegalAddress, 'null pointer'))
    test('an access to host memory is reported', () => {
      const host = numbers(256)
      expectFault(run('moe_test_null', 256, 'p', [Number(koffi.address(host))]), illegalAddress, 'not device memory')
    })
    test('use after free is reported', () => {
      const y = device.allocate(1024)
      device.free(y)
      expectFault(run('moe_test_null', 256, 'p', [y]), illegalAddress, 'which were freed')
    })
    test('a read of uninitialized memory is reported', () =>
      expectFault(
        run('moe_test_copy', 256, 'p p l', [device.allocate(1024), device.allocate(1024), 256]),
        illegalAddress,
        'uninitialized',
      ))
    test('a download of uninitialized memory is reported', () => {
      const y = device.allocate(1024)
      expect(() => device.download(y, Float32Array, 256)).toThrow('700')
      expect(device.report()).toMatch('uninitialized')
    })
    test('a misaligned vector is reported', () => {
      const x = device.upload(numbers(1024))
      const y = device.allocate(4096)
      expect(run('moe_test_copy4', 256, 'p p i', [y, x, 256])).toEqual({ status: 0, report: '' })
      expectFault(run('moe_test_copy4', 256, 'p p i', [y, x + 4, 255]), misalignedAddress, 'misaligned', 'float4')
    })
    test('a read of uninitialized shared memory is reported', () =>
      expectFault(
        run('moe_test_shared_unwritten', 256, 'p', [device.allocate(1024)]),
        illegalAddress,
        'byte 28 of shared array tile',
      ))
    test('a read of what another thread has written is reported without a barrier', () => {
      expect(run('moe_test_shared_race', 256, 'p i', [device.allocate(1024), 1])).toEqual({ status: 0, report: '' })
      expectFault(run('moe_test_shared_race', 256, 'p i', [device.allocate(1024), 0]), illegalAddress, 'barrier')
    })
    test('a write to shared memory that others may still read is reported without a barrier', () => {
      expect(run('moe_test_shared_overwrite', 256, 'p i', [device.allocate(1024), 1])).toEqual({
        status: 0,
        report: '',
      })
      expectFault(run('moe_test_shared_overwrite', 256, 'p i', [device.allocate(1024), 0]), launchFailed, 'race')
    })
    test.each([
      [64, 2, 4, 2],
      [64, 2, 40, 2],
      [64, 2, 4, 1],
      [64, 2, 3, 0],
      [32, 1, 4, 1],
      [32, 0, 4, 1],
    ])('reads that are repeated after a barrier are ordered by the next one (%i %i %i %i)', (threads, ...kinds) =>
      expect(run('moe_test_shared_again', threads, 'p i i i', [device.allocate(256), ...kinds])).toEqual({
        status: 0,
        report: '',
      }),
    )
    test.each([
      [64, 2, 4, 0, 'read by thread 3'],
      [64, 2, 40, 0, 'read by thread 3'],
      [64, 2, 40, 1, 'read by thread 3'],
      [64, 1, 4, 0, 'read by threads of several warps'],
      [32, 1, 4, 0, 'read by thread 3'],
      [32, 0, 4, 0, 'read by several lanes of warp 0'],
    ])('and a write without one is reported (%i %i %i %i)', (threads, reads, writer, writes, before) =>
      expectFault(
        run('moe_test_shared_again', threads, 'p i i i', [device.allocate(256), reads, writer, writes]),
        launchFailed,
        'race: write of byte 36 of shared array tile',
        before,
      ),
    )
    test('__syncwarp orders only the lanes of a warp', () => {
      expect(run('moe_test_shared_warp', 256, 'p i i', [device.allocate(1024), 1, 1])).toEqual({
        status: 0,
        report: '',
      })
      expectFault(run('moe_test_shared_warp', 256, 'p i i', [device.allocate(1024), 1, 0]), illegalAddress, 'barrier')
      device.reset()
      expectFault(run('moe_test_shared_warp', 256, 'p i i', [device.allocate(1024), 32, 1]), illegalAddress, 'barrier')
    })
    test('an access outside of the dynamic shared memory of the launch is reported', () => {
      expect(run('moe_test_dynamic', 256, 'p i', [device.allocate(1024), 255], 1024)).toEqual({ status: 0, report: '' })
      expectFault(
        run('moe_test_dynamic', 256, 'p i', [device.allocate(1024), 256], 1024),
        illegalAddress,
        'byte 1024 of dynamic',
      )
      device.reset()
      expectFault(
        run('moe_test_dynamic', 256, 'p i', [device.allocate(1024), -1], 1024),
        illegalAddress,
        'byte -4 of dynamic',
      )
    })
    test('an index outside of its array but inside the buffer is reported', () =>
      expectFault(
        run('moe_test_index', 256, 'p i', [device.allocate(1024), 32]),
        illegalAddress,
        'index 32 of an array',
      ))
    const globalRace = (mode: number) => {
      const y = device.upload(new Int32Array(256))
      const launched = device.launch('moe_test_global_race', 2, 64, 'p p i', [
        y,
        device.upload(new Int32Array(1)),
        mode,
      ])
      return { status: launched || device.synchronize(), report: device.report() }
    }
    test.each([0, 5, 6, 7])(
      'no race is reported if blocks or threads access different words, or synchronize (%i)',
      mode => expect(globalRace(mode)).toEqual({ status: 0, report: '' }),
    )
    test.each([
      [1, 'read', 'another block of this launch has written'],
      [2, 'write', 'another block of this launch has written'],
      [3, 'write', 'another block of this launch has read'],
      [4, 'read', 'thread 0 of this block has written without a barrier since'],
    ])('a race on device memory is reported (%i)', (mode, what, before) =>
      expectFault(globalRace(mode), launchFailed, `race: ${what} of device memory at 0x`, before),
    )
    test('a barrier that one thread does not reach is reported', () =>
      expectFault(
        run('moe_test_returns_early', 256, 'p', [device.allocate(1024)]),
        launchFailed,
        '255 of 256 threads',
        '1 returned (the first is 5)',
      ))
    test('threads of a block at different barriers are reported', () =>
      expectFault(run('moe_test_divergent', 256, 'p', [device.allocate(1024)]), launchFailed, 'divergent barrier'))
    test('a shuffle that not all lanes reach is reported', () => {
      expectFault(run('moe_test_missing_lanes', 256, 'p', [device.allocate(1024)]), launchFailed, 'wait at a shuffle')
      device.reset()
      expectFault(
        run('moe_test_missing_lanes', 16, 'p', [device.allocate(1024)]),
        launchFailed,
        'this warp has only 16',
      )
      device.reset()
      expectFault(run('moe_test_partial_mask', 256, 'p', [device.allocate(1024)]), launchFailed, 'mask 0x0000ffff')
    })
    test('division by zero and stack overflow are reported', () => {
      expectFault(run('moe_test_divide', 256, 'p i', [device.allocate(1024), 0]), launchFailed, 'division by zero')
      device.reset()
      expect(run('moe_test_deep', 32, 'p i', [device.allocate(128), 10])).toEqual({ status: 0, report: '' })
      expectFault(run('moe_test_deep', 32, 'p i', [device.allocate(128), 1000]), launchFailed, 'stack overflow')
    })

    describe('asynchronous copies', () => {
      const copies = (mode: number) => {
        const y = device.allocate(256)
        return { y, ...run('moe_test_async', 32, 'p p i', [y, device.upload(numbers(128)), mode]) }
      }
      test('are visible after a wait and a barrier; invalid sources give zeros', () => {
        const { y, status, report } = copies(0)
        expect({ status, report }).toEqual({ status: 0, report: '' })
        const values = device.download(y, Float32Array, 64)
        for (let i = 0; i < 32; i++) {
          expect(values[i]).toBe(i < 8 ? 0 : 4 * (31 - i) + 1)
          expect(values[32 + i]).toBe(4 * (31 - i) + 2)
        }
      })
      test.each([
        ['no thread waits', 1],
        ['no barrier follows', 2],
        ['threads wait for too few groups', 3],
      ])('are reported as a race if %s', (_, mode) => expectFault(copies(mode), launchFailed, 'race'))
      test('without checks, leave the target stale until the issuing thread waits', () => {
        device.set('checks', 0)
        try {
          const { y, status } = copies(1)
          expect(status).toBe(0)
          expect(device.download(y, Float32Array, 32)[31]).toBe(-1)
        } finally {
          device.reset()
          device.set('checks', 1)
        }
      })
    })

    test('launches that a driver rejects are rejected and leave the context usable', () => {
      const y = device.allocate(1024)
      expect(device.launch('moe_test_null', 1, 512, 'p', [y])).toBe(701)
      expect(device.launch('moe_test_null', 0, 256, 'p', [y])).toBe(1)
      expect(device.launch('moe_test_null', [1, 65536, 1], 256, 'p', [y])).toBe(1)
      expect(device.launch('moe_test_null', 1, 256, 'p p', [y, y])).toBe(1)
      expect(device.report()).toMatch('its parameters (p) take 8')
      expect(device.launch('moe_test_dynamic', 1, 256, 'p i', [y, 0], { shared: 64 << 10 })).toBe(1)
      expect(device.allowShared('moe_test_dynamic', 64 << 10)).toBe(0)
      expect(device.launch('moe_test_dynamic', 1, 256, 'p i', [y, 0], { shared: 64 << 10 })).toBe(0)
      expect(device.synchronize()).toBe(0)
      expect(device.allowShared('moe_test_dynamic', 256 << 10)).toBe(1)
    })

    test('static and dynamic shared memory together are limited to 48 KiB unless an attribute allows more', () => {
      const async = (shared: number) => device.launch('moe_test_async', 1, 32, 'p p i', [y, y, 0], { shared })
      const y = device.upload(new Float32Array(128))
      expect(async(0)).toBe(0)
      expect(device.synchronize()).toBe(0)
      expect(async(48 << 10)).toBe(1)
      expect(async(47 << 10)).toBe(0)
      expect(device.allowShared('moe_test_async', 48 << 10)).toBe(0)
      expect(async(48 << 10)).toBe(0)
      expect(device.synchronize()).toBe(0)
    })

    test('static and dynamic shared memory together are limited to the maximum of a block', () => {
      const most = 166912
      const both = () => device.launch('moe_test_shared_both', 1, 32, 'p', [device.allocate(128)], { shared: most })
      expect(device.allowShared('moe_test_shared_both', most)).toBe(0)
      // The size of static shared memory is only known once the kernel has run.
      expectFault({ status: both() || device.synchronize(), report: device.report() }, 701, 'and 166912 of dynamic')
      device.reset()
      expect(both()).toBe(1)
    })

    test('an error is sticky until the emulator is reset', () => {
      expect(run('moe_test_null', 256, 'p', [0]).status).toBe(illegalAddress)
      expect(device.synchronize()).toBe(illegalAddress)
      expect(() => device.allocate(16)).toThrow('700')
      device.reset()
      expect(device.synchronize()).toBe(0)
      expect(device.allocate(16)).toBeGreaterThan(0)
    })

    test('an injected failure of a launch occurs when it runs, that of a call immediately', () => {
      const y = device.allocate(1024)
      device.fail('launch', 2, launchFailed)
      expect(device.launch('moe_test_null', 1, 256, 'p', [y])).toBe(0)
      expect(device.synchronize()).toBe(0)
      expect(device.launch('moe_test_null', 1, 256, 'p', [y])).toBe(0)
      expect(device.synchronize()).toBe(launchFailed)
      device.reset()
      device.fail('alloc', 1, 2)
      expect(() => device.allocate(16)).toThrow('2')
      device.allocate(16)
      device.fail('cuLaunchKernel', 1, 999)
      expect(device.launch('moe_test_null', 1, 256, 'p', [y])).toBe(999)
      expect(device.synchronize()).toBe(0)
    })

    test('invalid module images are rejected', () => {
      expect(device.loadModule(Buffer.from('not a module, but long enough to look at'))).toBe(200)
      expect(device.loadModule(Buffer.from('50ed55ba01001000', 'hex'))).toBe(209)
      expect(device.loadModule(Buffer.from('moe-emulated-module of-nobody\n\0'))).toBe(209)
    })
  })
})
