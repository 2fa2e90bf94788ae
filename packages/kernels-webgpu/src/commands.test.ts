import { full, tensor } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { webgpuBackend } from './backend.ts'
import { Commands, word } from './commands.ts'
import { GPUOutOfMemoryError, testDevice } from './test-device.ts'

const ready = (limits?: Parameters<typeof testDevice>[0]) => {
  const gpu = testDevice(limits)
  return { ...gpu, backend: webgpuBackend(gpu.device) }
}

describe('calls to the device', () => {
  test('repeated work reuses its buffers and bind groups', () => {
    const { backend, calls } = ready()
    const x = tensor([1, 2, 3], [3], { backend })
    const round = () => {
      const made = [x]
      for (let i = 0; i < 5; i++) made.push(made[i].exp())
      // If the buffer freed last were reused first, buffers would rotate among the tensors and need new bind groups for five rounds.
      for (const i of [1, 5, 4, 3, 2]) made[i].dispose()
    }
    round()
    round()
    const { createBuffer, createBindGroup, createComputePipeline, dispatchWorkgroups } = calls
    for (let i = 0; i < 4; i++) round()
    expect(calls).toMatchObject({ createBuffer, createBindGroup, createComputePipeline })
    expect(calls.dispatchWorkgroups).toBe(3 * dispatchWorkgroups)
  })

  test('256 kernels are submitted together', async () => {
    const { backend, calls } = ready()
    const x = tensor([1], [1], { backend })
    for (let i = 0; i < 600; i++) x.exp().dispose()
    expect(calls.submit).toBe(2)
    await backend.sync()
    expect(calls.submit).toBe(3)
    await backend.sync()
    expect(calls.submit).toBe(3)
  })

  test('buffers for tensors are at most as large as the device can bind', async () => {
    // As many NVIDIA and AMD GPUs report it.
    const most = 2 ** 31 - 4
    const { backend } = ready({ maxBufferSize: 2 ** 31, maxStorageBufferBindingSize: most })
    for (const bytes of [most, most - 4, most - 2 ** 27 + 4]) full([bytes / 4], 1, { backend }).dispose()
    await backend.sync()
    expect(() => full([2 ** 29], 1, { backend })).toThrow(expect.objectContaining({ code: 'E_OUT_OF_MEMORY' }))
  })

  test('more workgroups than the device supports are an error, unless they can continue along the next axis', async () => {
    const { backend } = ready({ maxComputeWorkgroupsPerDimension: 8 })
    const [x, y] = [64 * 9, 2].map(size => full([size, 1], 1, { backend }))
    x.exp().dispose()
    const { handles } = backend.stats()
    // Nine tiles of 64 rows.
    expect(() => x.matmul(y, { transposeB: true })).toThrow(
      expect.objectContaining({ code: 'E_UNSUPPORTED', message: expect.stringMatching(/1 x 9 x 1 workgroups.* 8 /) }),
    )
    expect(backend.stats().handles).toBe(handles)
    await backend.sync()
  })

  test('a row times more columns than the kernel for few rows has workgroups for is computed by another kernel', async () => {
    const { backend } = ready()
    const [row, columns] = [1, 65_535 * 16 + 1].map(size => full([size, 1], 1, { backend }))
    row.matmul(columns, { transposeB: true }).dispose()
    await backend.sync()
  })

  test('pending work is submitted before the memory of live tensors is destroyed with the backend', () => {
    const { backend, log } = ready()
    tensor([1], [1], { backend }).exp()
    backend.dispose()
    expect(log.indexOf('submit')).toBeGreaterThan(0)
    expect(log.indexOf('submit')).toBeLessThan(log.indexOf('destroy buffer'))
  })

  test('pending work is submitted before its memory is destroyed', () => {
    const { backend, calls } = ready()
    const x = tensor(new Float32Array(1000), [1000], { backend })
    x.exp().dispose()
    expect(calls.submit).toBeUndefined()
    backend.trim?.()
    expect(calls).toMatchObject({ submit: 1, 'destroy buffer': 1 })
  })
})

describe('launches', () => {
  const program = { label: 'test', buffers: ['x f32', 'y* i32'], body: 'fn main() {}' }
  const make = () => {
    const gpu = testDevice()
    const commands = new Commands(gpu.device)
    const [x, y, z] = [16, 32, 64].map(size => gpu.device.createBuffer({ size, usage: 0 }))
    return { ...gpu, commands, x, y, z }
  }

  test('declare and bind the parameters and the buffers in order', () => {
    const { commands, launches, x, y, z } = make()
    commands.run(program, [x, y], [1], [3, 4])
    commands.run(program, [z, y], [1], [5])
    commands.run(program, [x, y], [1], [65_536])
    const [first, second, third] = launches
    expect(first.code).toMatch(
      /@binding\(1\) var<storage, read> x: array<f32>;\n.*@binding\(2\) var<storage, read_write> y: array<i32>;/,
    )
    expect(first.layout).toMatchObject([
      { binding: 0, buffer: { type: 'uniform', hasDynamicOffset: true } },
      { binding: 1, buffer: { type: 'read-only-storage' } },
      { binding: 2, buffer: { type: 'storage' } },
    ])
    const bound = (buffers: object[]) => buffers.map((buffer, i) => ({ binding: i + 1, resource: { buffer } }))
    expect(first.group.slice(1)).toEqual(bound([x, y]))
    expect(first.group[0]).toMatchObject({ binding: 0, resource: { offset: 0, size: 256, buffer: { size: 2 ** 16 } } })
    expect(second.group.slice(1)).toEqual(bound([z, y]))
    expect(third.group).toBe(first.group)
    expect(launches.map(({ offsets }) => offsets)).toEqual([[0], [256], [512]])
    expect(launches.map(({ groups }) => groups)).toEqual([
      [3, 4, 1],
      [5, 1, 1],
      [65_535, 2, 1],
    ])
  })

  test('have parameters of their own, which are written when the work is submitted', () => {
    const { commands, writes, x, y } = make()
    commands.clear(x, 16)
    commands.submit()
    expect(writes).toEqual([])
    for (const value of [7, -1, word(1.5)]) commands.run(program, [x, y], [value, 9], [1])
    commands.submit()
    commands.run(program, [x, y], [11], [1])
    commands.submit()
    const words = writes.map(({ at, bytes }) => [at, ...new Uint32Array(bytes.buffer)])
    expect(words.map(({ length }) => length)).toEqual([1 + 3 * 64, 1 + 64])
    const own = words.map(list => [list[0], list[1], list[65], list[129]])
    expect(own).toEqual([
      [0, 7, 2 ** 32 - 1, 0x3fc00000],
      [0, 11, undefined, undefined],
    ])
    expect(words[0].slice(2, 3)).toEqual([9])
  })

  test('that use a buffer are submitted before new contents are written to it', () => {
    const { commands, calls, x, y, z } = make()
    const uses = [
      () => commands.run(program, [x, y], [], [1]),
      () => commands.run(program, [y, x], [], [1]),
      () => commands.copy(x, y, 16),
      () => commands.copy(y, x, 16),
      () => commands.clear(x, 16),
    ]
    for (const [i, use] of uses.entries()) {
      use()
      commands.upload(new Uint8Array(16), z)
      commands.upload(new Uint8Array(0), x)
      expect(calls.submit ?? 0).toBe(i)
      commands.upload(new Uint8Array(16), x)
      commands.upload(new Uint8Array(16), x)
      expect(calls.submit).toBe(i + 1)
    }
  })
})

describe('errors', () => {
  const expectFailure = async (fail: (gpu: ReturnType<typeof ready>) => void, code: string, message: RegExp) => {
    const gpu = ready()
    const x = tensor([1, 2], [2], { backend: gpu.backend })
    expect(await x.values()).toEqual(Float32Array.of(0, 0))
    fail(gpu)
    const expected = expect.objectContaining({ code, message: expect.stringMatching(message) })
    await expect(x.add(1).values()).rejects.toEqual(expected)
    // Later calls fail as well, because the work submitted together with the failed work has not run.
    await expect(x.values()).rejects.toEqual(expected)
    await expect(gpu.backend.sync()).rejects.toEqual(expected)
  }

  test('running out of memory fails this and all later calls', () =>
    expectFailure(gpu => gpu.report(new GPUOutOfMemoryError('no 5 GB')), 'E_OUT_OF_MEMORY', /no 5 GB.*smaller batch/))

  test('a kernel that the device rejects fails this and all later calls', () =>
    expectFailure(
      gpu => gpu.report(new Error('binding 3 is too small')),
      'E_BACKEND',
      /binding 3 is too small.*please report/,
    ))

  test('a lost device fails this and all later calls', () =>
    expectFailure(
      gpu => gpu.lose('driver was reset'),
      'E_BACKEND',
      /the GPU was lost: driver was reset.*last checkpoint/,
    ))

  test('the first of several errors is reported', () =>
    expectFailure(
      gpu => {
        gpu.report(new Error('first'))
        gpu.lose('then')
      },
      'E_BACKEND',
      /first/,
    ))

  test('a disposed device does not count as lost', async () => {
    const { backend, lose } = ready()
    backend.dispose()
    lose('too late')
    await expect(backend.sync()).resolves.toBeUndefined()
  })

  test('the error for a device with too low limits lists them', () => {
    expect(() => ready({ maxStorageBuffersPerShaderStage: 4, maxComputeInvocationsPerWorkgroup: 128 })).toThrow(
      expect.objectContaining({
        code: 'E_UNSUPPORTED',
        message: expect.stringMatching(
          /maxStorageBuffersPerShaderStage 4.* 8.*maxComputeInvocationsPerWorkgroup 128.* 256/,
        ),
      }),
    )
  })
})
