import { join } from 'node:path'
import { Linear, loadStateDict, Module, Parameter, setDefaultBackend, stateDict, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { beforeAll, describe, expect, it } from 'vitest'
import { convertCheckpoint } from './convert-checkpoint.ts'
import { openCheckpoint } from './open-checkpoint.ts'
import { saveCheckpoint } from './save-checkpoint.ts'
import { stateSource } from './state-source.ts'
import { fixture, temporaryFolder } from './test-files.ts'

class Two extends Module {
  first = new Linear(4, 3)
  second = new Linear(3, 2)
}

beforeAll(() => setDefaultBackend(referenceBackend()))

describe('stateSource', () => {
  it.each([1e9, 48])('restores a saved module, with shards of at most %d bytes', async maxShardBytes => {
    const folder = await temporaryFolder()
    const saved = new Two()
    saved.first.weight.assign(
      tensor(
        Array.from({ length: 12 }, (_, i) => i + 0.5),
        [3, 4],
      ),
    )
    saved.second.weight.assign(
      tensor(
        Array.from({ length: 6 }, (_, i) => -i),
        [2, 3],
      ),
    )
    await saveCheckpoint(folder, stateDict(saved), { maxShardBytes })
    await using checkpoint = await openCheckpoint(folder)
    expect(checkpoint.keys()).toEqual(['first.weight', 'second.weight'])
    const loaded = new Two()
    expect(await loaded.first.weight.data()).not.toEqual(await saved.first.weight.data())
    await loadStateDict(loaded, stateSource(checkpoint))
    expect(await loaded.first.weight.data()).toEqual(await saved.first.weight.data())
    expect(await loaded.second.weight.data()).toEqual(await saved.second.weight.data())
  })

  it('returns fp8 weights dequantized, without their scales', async () => {
    await using checkpoint = await openCheckpoint(fixture('fp8-blocks.safetensors'))
    const source = stateSource(checkpoint)
    const key = 'model.layers.0.mlp.up_proj.weight'
    expect([...source.keys()].sort()).toEqual(['expected.dequantized', 'expected.rows', key, 'model.norm.weight'])
    expect(source.info(key)).toEqual({ dtype: 'f32', shape: [192, 320] })
    expect(((await source.read(key)) as Float32Array).slice(0, 320)).toEqual(
      ((await source.read('expected.dequantized')) as Float32Array).slice(0, 320),
    )
    expect(source.info('model.norm.weight').dtype).toBe('bf16')
    expect(await source.read('model.norm.weight')).toEqual(new Uint16Array(4).fill(0x3f80))
  })

  it('lists scales of weights that are not f8e4m3, because they are not applied', async () => {
    const folder = await temporaryFolder()
    await saveCheckpoint(folder, [
      { name: 'weight', dtype: 'i8', shape: [1, 2], data: Int8Array.of(1, 2) },
      { name: 'weight_scale_inv', dtype: 'f32', shape: [1, 1], data: Float32Array.of(0.5) },
    ])
    await using checkpoint = await openCheckpoint(folder)
    expect([...stateSource(checkpoint).keys()].sort()).toEqual(['weight', 'weight_scale_inv'])
    const { written } = await convertCheckpoint(checkpoint, join(folder, 'copy'), { dtype: 'bf16' })
    expect(written.toSorted()).toEqual(['weight', 'weight_scale_inv'])
  })

  it('returns dtypes that core lacks as f32', async () => {
    await using checkpoint = await openCheckpoint(fixture('dtypes.safetensors'))
    const source = stateSource(checkpoint)
    for (const key of ['f64', 'i64', 'bool']) {
      expect(source.info(key).dtype).toBe('f32')
      expect(await source.read(key)).toBeInstanceOf(Float32Array)
    }
    expect(source.info('f8_e4m3').dtype).toBe('f8e4m3')
    expect(source.info('u8').dtype).toBe('u8')
  })

  it('keeps bf16 parameters bit for bit', async () => {
    const folder = join(await temporaryFolder(), 'a')
    class Half extends Module {
      weight = new Parameter(tensor([1, -2.5, 0.1], [3], { dtype: 'bf16' }))
    }
    const saved = new Half()
    await saveCheckpoint(folder, stateDict(saved))
    await using checkpoint = await openCheckpoint(folder)
    expect(await checkpoint.read('weight')).toEqual({ dtype: 'bf16', shape: [3], data: await saved.weight.data() })
  })
})
