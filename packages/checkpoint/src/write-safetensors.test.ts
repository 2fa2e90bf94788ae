import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { readSafetensors } from './read-safetensors.ts'
import { saveCheckpoint } from './save-checkpoint.ts'
import { type StoredDType, storedBytes, viewStored } from './stored-dtype.ts'
import { fixture, temporaryFolder } from './test-files.ts'
import { type TensorEntry, writeSafetensors } from './write-safetensors.ts'

const run = promisify(execFile)
const f32 = (name: string, ...values: number[]): TensorEntry => ({
  name,
  dtype: 'f32',
  shape: [values.length],
  data: Float32Array.from(values),
})

describe('a written file', () => {
  it('is read back bit for bit, for every dtype and shape', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    const dtype = fc.constantFrom<StoredDType>(
      'f64',
      'f32',
      'bf16',
      'f16',
      'f8e4m3',
      'f8e5m2',
      'f8e4m3fnuz',
      'f8e5m2fnuz',
      'i64',
      'i32',
      'i8',
      'u8',
      'bool',
      'c64',
    )
    const tensor = fc
      .record({
        name: fc.string({ unit: 'grapheme', minLength: 1 }),
        dtype,
        shape: fc.array(fc.nat(5), { maxLength: 4 }),
      })
      .filter(({ name }) => name !== '__metadata__')
      .chain(t => {
        const bytes = storedBytes(t.dtype, t.shape)
        return fc.record({
          name: fc.constant(t.name),
          dtype: fc.constant(t.dtype),
          shape: fc.constant(t.shape),
          raw: fc.uint8Array({ minLength: bytes, maxLength: bytes }),
        })
      })
    await fc.assert(
      fc.asyncProperty(
        fc.uniqueArray(tensor, { selector: t => t.name, maxLength: 8 }),
        fc.boolean(),
        async (list, lazily) => {
          const entries = list.map(({ raw, ...t }) => {
            const data = viewStored(t.dtype, raw.slice())
            return { ...t, data: lazily ? () => Promise.resolve(data) : data }
          })
          const bytes = await writeSafetensors(path, entries, { metadata: { by: 'test' } })
          expect((await stat(path)).size).toBe(bytes)
          await using file = await readSafetensors(path)
          expect(file.metadata).toEqual({ by: 'test' })
          expect(file.keys()).toHaveLength(list.length)
          for (const { name, dtype: wanted, shape, raw } of list) {
            const read = await file.read(name)
            expect(read).toMatchObject({ dtype: wanted, shape })
            expect(new Uint8Array(read.data.buffer, read.data.byteOffset, read.data.byteLength)).toEqual(raw)
          }
        },
      ),
      { numRuns: 60 },
    )
  })

  it('aligns every tensor to the size of its elements', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    await writeSafetensors(path, [
      { name: 'odd', dtype: 'u8', shape: [3], data: Uint8Array.of(1, 2, 3) },
      { name: 'half', dtype: 'bf16', shape: [1], data: Uint16Array.of(1) },
      { name: 'wide', dtype: 'i64', shape: [1], data: BigInt64Array.of(1n) },
      f32('float', 1),
    ])
    await using file = await readSafetensors(path)
    expect(file.keys()).toEqual(['wide', 'float', 'half', 'odd'])
  })

  it('is made by requesting each tensor once, one at a time, after all entries are validated', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    const calls: string[] = []
    const lazy = (name: string): TensorEntry => ({
      name,
      dtype: 'f32',
      shape: [1],
      data: async () => {
        calls.push(name)
        return Float32Array.of(calls.length)
      },
    })
    await writeSafetensors(path, [lazy('a'), lazy('b'), lazy('c')])
    expect(calls).toEqual(['a', 'b', 'c'])
    await expect(writeSafetensors(path, [lazy('a'), lazy('a')])).rejects.toThrow(/"a" occurs twice/)
    expect(calls).toHaveLength(3)
  })

  it('may contain tensors smaller and larger than the write buffer', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    const sizes = [1, 2 ** 18, 5, 2 ** 18 - 1, 2 ** 19, 7]
    const entries = sizes.map((size, i) => f32(`t${i}`, ...new Float32Array(8).fill(i), size))
    const large = sizes.map(
      (size, i): TensorEntry => ({
        name: `large${i}`,
        dtype: 'f32',
        shape: [size],
        data: new Float32Array(size).fill(i + 0.5),
      }),
    )
    await writeSafetensors(path, [...entries, ...large])
    await using file = await readSafetensors(path)
    for (const [i, size] of sizes.entries()) {
      expect((await file.read(`large${i}`)).data).toEqual(new Float32Array(size).fill(i + 0.5))
      expect((await file.read(`t${i}`)).data[8]).toBe(size)
    }
  })
})

describe('an entry that cannot be written', () => {
  const bad = (entry: object): TensorEntry => ({ ...f32('a', 1), ...entry }) as TensorEntry
  it.each<[string, TensorEntry[], RegExp]>([
    [
      'an object instead of a list',
      {} as TensorEntry[],
      /expected a list of tensors; pass entries, for example stateDict\(module\)/,
    ],
    ['a duplicate name', [f32('a', 1), f32('a', 2)], /"a" occurs twice/],
    ['an empty name', [bad({ name: '' })], /has an invalid name/],
    ['the name of the metadata', [bad({ name: '__metadata__' })], /has an invalid name/],
    ['a lone surrogate', [bad({ name: 'a\ud800' })], /has an invalid name/],
    ['an unknown dtype', [bad({ dtype: 'float32' })], /unknown dtype "float32"/],
    ['a negative size', [bad({ shape: [-1] })], /shape \[-1\]; sizes must be non-negative integers/],
    ['too little data', [bad({ shape: [2] })], /of dtype f32 \[2\] needs 8 bytes, got 4/],
    [
      'data of another type',
      [bad({ data: Float64Array.of(1) })],
      /got Float64Array; pass Float32Array, or its bytes as Uint8Array$/,
    ],
    ['plain numbers', [bad({ data: [1] })], /got Array; pass Float32Array, or/],
    ['plain booleans', [bad({ dtype: 'bool', data: [true] })], /got Array; pass Uint8Array$/],
    [
      'a size beyond 2^53',
      [bad({ shape: [2 ** 50, 2 ** 50], data: () => new Float32Array(0) })],
      /whole number of bytes below/,
    ],
  ])('is rejected before anything is written: %s', async (_, entries, fault) => {
    const folder = await temporaryFolder()
    await expect(writeSafetensors(join(folder, 'a.safetensors'), entries)).rejects.toThrow(fault)
    expect(await readdir(folder)).toEqual([])
  })

  it('is rejected if its function returns data of the wrong size', async () => {
    const folder = await temporaryFolder()
    const entries = [f32('first', 1), bad({ data: () => new Float32Array(3) })]
    await expect(writeSafetensors(join(folder, 'a.safetensors'), entries)).rejects.toThrow(/needs 4 bytes, got 12/)
    expect(await readdir(folder)).toEqual([])
  })

  it('is rejected if its metadata are not strings', async () => {
    const folder = await temporaryFolder()
    const metadata = { step: 3 } as unknown as Record<string, string>
    await expect(writeSafetensors(join(folder, 'a.safetensors'), [], { metadata })).rejects.toThrow(
      /metadata.step is a number/,
    )
  })

  it('is rejected if its metadata are not well-formed, which other libraries cannot read', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    for (const metadata of [{ note: '\ud800' }, { '\udc00': 'x' }] as Record<string, string>[])
      await expect(writeSafetensors(path, [], { metadata })).rejects.toThrow(/contains a lone surrogate/)
  })
})

describe('a failed write', () => {
  it('leaves the previous file intact and no temporary file', async () => {
    const folder = await temporaryFolder()
    const path = join(folder, 'a.safetensors')
    await writeSafetensors(path, [f32('kept', 42)])
    const before = await readFile(path)
    const failing: TensorEntry = {
      name: 'b',
      dtype: 'f32',
      shape: [1],
      data: () => {
        throw new Error('device lost')
      },
    }
    const large: TensorEntry = { name: 'a', dtype: 'f32', shape: [2 ** 20], data: new Float32Array(2 ** 20) }
    await expect(writeSafetensors(path, [large, failing])).rejects.toThrow('device lost')
    expect(await readFile(path)).toEqual(before)
    expect(await readdir(folder)).toEqual(['a.safetensors'])
  })

  it('to a missing folder names the file and the reason', async () => {
    const path = join(await temporaryFolder(), 'none', 'a.safetensors')
    await expect(writeSafetensors(path, [])).rejects.toThrow(
      `${path}: writing failed: no such file or folder; create the folder ${dirname(path)} first`,
    )
  })

  // A limit on file sizes interrupts a write like a full disk, and setting one needs no privilege.
  it.skipIf(process.platform === 'win32' /* no ulimit */)(
    'for lack of space leaves the previous file intact and names the reason; shards that fit are written',
    async () => {
      const folder = await temporaryFolder()
      const path = join(folder, 'model.safetensors')
      await saveCheckpoint(folder, [f32('kept', 42)])
      const script = join(folder, 'save.ts')
      const source = fileURLToPath(new URL('save-checkpoint.ts', import.meta.url))
      await writeFile(
        script,
        `import { existsSync, readFileSync } from 'node:fs'
       import { saveCheckpoint } from ${JSON.stringify(source)}
       const before = readFileSync(${JSON.stringify(path)})
       const isUnchanged = () => existsSync(${JSON.stringify(path)}) && readFileSync(${JSON.stringify(path)}).equals(before)
       const data = new Float32Array(2 ** 20)
       const entries = ['a', 'b', 'c'].map(name => ({ name, dtype: 'f32' as const, shape: [2 ** 20], data }))
       process.on('SIGXFSZ', () => {})
       for (const maxShardBytes of [2 ** 30, 2 ** 22 + 1])
         await saveCheckpoint(${JSON.stringify(folder)}, entries, { maxShardBytes: maxShardBytes }).then(
           () => console.log('saved', isUnchanged()),
           error => console.log(isUnchanged(), error.code, error.details.errno, error.message))`,
      )
      // 9,000 blocks of 512 bytes: the one file of 12 MB does not fit, the shards of 4 MB do.
      const sh = ['-c', 'ulimit -f 9000; exec "$0" "$1"', process.execPath, script]
      const { stdout } = await run('sh', sh)
      const [single, shards] = stdout.trim().split('\n')
      expect(single).toMatch(
        /^true E_CHECKPOINT EFBIG .*model.safetensors: writing failed: .* exceeds the maximum file size.*unchanged/,
      )
      expect(shards).toBe('saved false')
      await expect(readFile(path), 'the shards replaced the single file').rejects.toThrow()
    },
  )
})

const python = fileURLToPath(new URL('../../../.venv-reference/bin/python', import.meta.url))
const check = fileURLToPath(new URL('../../../tools/reference/check_safetensors.py', import.meta.url))

interface PythonView {
  metadata: Record<string, string>
  tensors: Record<string, { dtype: string; shape: number[]; bytes: string; sum: number }>
}

/** Needs the virtual environment that tools/reference/setup.sh creates. */
describe.skipIf(!existsSync(python))("Python's safetensors", () => {
  const view = async (path: string): Promise<PythonView> => JSON.parse((await run(python, [check, path])).stdout)

  it('reads the same from a file of writeSafetensors as from its own', async () => {
    const folder = await temporaryFolder()
    const path = join(folder, 'a.safetensors')
    await using original = await readSafetensors(fixture('dtypes.safetensors'))
    const entries: TensorEntry[] = []
    for (const name of original.keys()) entries.push({ name, ...(await original.read(name)) })
    await writeSafetensors(path, entries, { metadata: { ...original.metadata } })
    expect(await view(path)).toEqual(await view(fixture('dtypes.safetensors')))
  })

  it('opens the shards of saveCheckpoint', async () => {
    const folder = await temporaryFolder()
    const entries = ['a', 'b', 'c'].map((name, i) => f32(name, i, i + 0.5, -i))
    const { files } = await saveCheckpoint(folder, entries, { maxShardBytes: 24 })
    expect(files).toHaveLength(3)
    const { tensors } = await view(folder)
    expect(Object.keys(tensors).sort()).toEqual(['a', 'b', 'c'])
    expect(tensors['c']).toMatchObject({ dtype: 'float32', shape: [3], sum: 2.5 })
  })
})
