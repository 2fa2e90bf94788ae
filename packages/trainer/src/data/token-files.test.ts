import {
  closeSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { TrainEvent } from '../events.ts'
import { BigramModel, letters, letterTexts } from '../test-model.ts'
import { tokenize } from '../tokenize/index.ts'
import { train } from '../train.ts'
import { evaluationWindows } from './evaluation-windows.ts'
import { encodeIndex } from './indexed-file.ts'
import { batchOf } from './rows.ts'
import { TokenDataset } from './token-dataset.ts'
import { tokenFiles } from './token-files.ts'
import { TrainingOrder } from './training-order.ts'

let folder: string
beforeAll(() => {
  setDefaultBackend(referenceBackend())
  folder = mkdtempSync(join(tmpdir(), 'tokens-'))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

let count = 0

/** Writes files in the format of Megatron-LM's `_IndexWriter`, independently of our code, with any number of sequences per document. */
function megatron(documents: readonly (readonly number[][])[], { wide = false, modes = false } = {}): string {
  const path = join(folder, `megatron-${count++}`)
  const sequences = documents.flat()
  const bytes = wide ? 4 : 2
  const ids = sequences.flat()
  writeFileSync(`${path}.bin`, wide ? Int32Array.from(ids) : Uint16Array.from(ids))
  const longs = (values: readonly number[]) => BigInt64Array.from(values, BigInt)
  const sumsBefore = (counts: readonly number[]) =>
    counts.map((_, i) => counts.slice(0, i).reduce((sum, count) => sum + count, 0))
  const pointers = sumsBefore(sequences.map(({ length }) => length * bytes))
  const indices = sumsBefore([...documents.map(({ length }) => length), 0])
  const parts = [
    Buffer.from('MMIDIDX\0\0'),
    BigUint64Array.of(1n),
    Uint8Array.of(wide ? 4 : 8),
    BigUint64Array.of(BigInt(sequences.length), BigInt(indices.length)),
    Int32Array.from(sequences, ({ length }) => length),
    longs(pointers),
    longs(indices),
    ...(modes ? [new Uint8Array(sequences.length)] : []),
  ]
  writeFileSync(
    `${path}.idx`,
    Buffer.concat(parts.map(part => Buffer.from(part.buffer, part.byteOffset, part.byteLength))),
  )
  return path
}

const oneSequenceEach = (documents: readonly number[][]) => documents.map(ids => [ids])
const documentsOf = fc.array(fc.array(fc.nat(30), { minLength: 1, maxLength: 12 }), { minLength: 2, maxLength: 12 })

describe('files of Megatron-LM', () => {
  test('are read as the same documents as in memory, from any number of files', () => {
    fc.assert(
      fc.property(documentsOf, fc.nat(12), fc.boolean(), fc.boolean(), (documents, cut, wide, modes) => {
        const parts = [documents.slice(0, cut), documents.slice(cut)].filter(part => part.length > 0)
        const paths = parts.map(part => megatron(oneSequenceEach(part), { wide, modes }))
        const { training } = tokenFiles([`${paths[0]}.bin`, ...paths.slice(1)], { vocabSize: 31 })
        const memory = TokenDataset.fromTokens(documents, { vocabSize: 31 })
        expect([training.length, training.documents, training.predictable]).toEqual([
          memory.length,
          memory.documents,
          memory.predictable,
        ])
        for (let at = 0; at < memory.length; at++) {
          expect([...training.read(at, memory.length - at)]).toEqual([...memory.tokens.subarray(at)])
          expect(training.documentAt(at)).toBe(memory.documentAt(at))
        }
        for (let i = 0; i <= memory.documents; i++) expect(training.startOf(i)).toBe(memory.startOf(i))
        training.close()
      }),
      { numRuns: 60 },
    )
  })

  test('may have documents with several sequences or none', () => {
    const path = megatron([[[1, 2], [3]], [], [[4]], [[]], [[], [5, 6]], []])
    const { training, validation } = tokenFiles(path, { vocabSize: 7, validation: `${path}.idx` })
    expect([...training.read(0, 6)]).toEqual([1, 2, 3, 4, 5, 6])
    expect([0, 1, 2, 3].map(i => training.startOf(i))).toEqual([0, 3, 4, Number.POSITIVE_INFINITY])
    expect(validation?.length).toBe(6)
  })

  test('have the same index bytes as ours', () => {
    const documents = [[1, 2, 3], [4], [5, 6]]
    const bytes = Buffer.concat([
      ...encodeIndex(
        Int32Array.from(documents, ({ length }) => length),
        2,
      ),
    ])
    expect(bytes).toEqual(readFileSync(`${megatron(oneSequenceEach(documents))}.idx`))
  })

  test('are rejected if they are corrupt or of another format', () => {
    const expectError = (change: (path: string) => void, message: RegExp, options: object = { vocabSize: 9 }) => {
      const path = megatron([[[1, 2], [3]], [[8]]])
      change(path)
      expect(() => {
        const { training } = tokenFiles(path, options)
        training.read(0, training.length)
      }, String(message)).toThrow(expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(message) }))
    }
    const set = (at: number, value: number) => (path: string) => {
      const bytes = readFileSync(`${path}.idx`)
      bytes[at] = value
      writeFileSync(`${path}.idx`, bytes)
    }
    expectError(path => rmSync(`${path}.idx`), /idx: cannot read the file/)
    expectError(path => rmSync(`${path}.bin`), /bin: cannot read the file/)
    expectError(path => truncateSync(`${path}.idx`, 20), /not an index file/)
    expectError(path => truncateSync(`${path}.idx`, 90), /has 90 bytes, but 3 sequences in 2 documents need 94/)
    expectError(path => truncateSync(`${path}.bin`, 7), /has 7 bytes, but its index describes 8/)
    expectError(path => writeFileSync(`${path}.bin`, 'longer than that'), /use the .idx that belongs/)
    expectError(set(0, 0), /not an index file/)
    expectError(set(9, 2), /version 2/)
    expectError(set(17, 6), /id type 6/)
    expectError(set(25, 255), /sequences in 2 documents need/)
    expectError(set(37, 255), /negative length/)
    expectError(set(34, 1), /sequence 1 does not start where/)
    expectError(set(54, 9), /sequence 1 does not start where/)
    expectError(set(70, 1), /documents do not cover the sequences in order/)
    expectError(set(78, 200), /documents do not cover the sequences in order/)
    expectError(set(86, 2), /documents do not cover the sequences in order/)
    expectError(() => {}, /token 3 is 8, outside the vocabulary of 8/, { vocabSize: 8 })
    expectError(() => {}, /vocabSize is undefined/, {})
    expect(() => tokenFiles(join(folder, 'missing'))).toThrow(
      /there is no folder .*missing; write it with moe-trainer tokenize/,
    )
    expect(() => tokenFiles(megatron([[[1]]]), { vocabSize: 9 })).toThrow(/has 1 tokens/)
    expect(() => tokenFiles(megatron([]), { vocabSize: 9 })).toThrow(/has 0 tokens/)
  })

  test('may have more than 2^32 tokens', () => {
    const path = join(folder, 'large')
    const lengths = Int32Array.of(2 ** 31 - 1, 2 ** 31 - 1, 2 ** 31 - 1, 5)
    writeFileSync(`${path}.idx`, Buffer.concat([...encodeIndex(lengths, 2)]))
    const length = 3 * (2 ** 31 - 1) + 5
    // A sparse file: only its last tokens are not 0.
    const file = openSync(`${path}.bin`, 'w')
    writeSync(file, Uint16Array.of(1, 2, 3, 4, 5), 0, 10, 2 * (length - 5))
    closeSync(file)
    const { training } = tokenFiles(path, { vocabSize: 9 })
    expect([training.length, training.documentAt(length - 1), training.startOf(3)]).toEqual([length, 3, length - 5])
    expect([...training.read(length - 6, 6)]).toEqual([0, 1, 2, 3, 4, 5])
    expect([...training.read(length - 6 - 2 ** 32, 2)]).toEqual([0, 0])
    const sizes = { sequenceLength: 2 ** 20, lookahead: 1, batchSize: 1 }
    expect(new TrainingOrder(training, sizes).windows).toBe(Math.ceil((length - 1) / 2 ** 20))
    const batch = batchOf(training, [[length - 7]], 8, false)
    expect([[...batch.tokens], [...batch.documents]]).toEqual([
      [0, 0, 1, 2, 3, 4, 5, 0],
      [2, 2, 3, 3, 3, 3, 3, -8],
    ])
    training.close()
  })
})

const texts = letterTexts(20, 37)
const heldOut = letterTexts(3, 60, 2)

async function tokenizedFolder(name: string, documents: readonly string[], options: object = {}): Promise<string> {
  const out = join(folder, `${name}-${count++}`)
  const path = `${out}.jsonl`
  writeFileSync(path, documents.map(text => `${JSON.stringify({ text })}\n`).join(''))
  await tokenize(path, { tokenizer: letters, out, threads: 1, shardTokens: 100, ...options })
  return out
}

describe('training from files', () => {
  test('uses the same rows and evaluation windows as the documents in memory, on every rank', async () => {
    const { training } = tokenFiles(await tokenizedFolder('a', texts))
    const memory = TokenDataset.fromTexts(texts, letters)
    for (const isolate of [false, true]) {
      for (const rank of [0, 1]) {
        const options = {
          sequenceLength: 8,
          lookahead: 2,
          batchSize: 3,
          accumulate: 2,
          seed: 4,
          rank,
          world: 2,
          isolate,
        }
        const [files, inMemory] = [new TrainingOrder(training, options), new TrainingOrder(memory, options)]
        for (let step = 0; step < 20; step++) expect(files.step(step)).toEqual(inMemory.step(step))
      }
    }
    const options = { sequenceLength: 8, lookahead: 2, batchSize: 3 }
    expect([...evaluationWindows(training, options)]).toEqual([...evaluationWindows(memory, options)])
  })

  test('gives the same losses as with the documents in memory, bit for bit', async () => {
    const losses = async (data: Parameters<typeof train>[1]['data']) => {
      const seen: number[] = []
      const onEvent = (event: TrainEvent) => event.type === 'step' && seen.push(event.loss, event.gradNorm)
      const options = { data, tokenizer: letters, steps: 12, batchSize: 2, sequenceLength: 8, progress: false, onEvent }
      const { validation } = await train(new BigramModel(), options)
      return [...seen, validation.loss, validation.bitsPerByte]
    }
    const training = tokenFiles(await tokenizedFolder('b', texts)).training
    const validation = tokenFiles(await tokenizedFolder('b', heldOut)).training
    expect(await losses({ training, validation })).toEqual(
      await losses({
        training: TokenDataset.fromTexts(texts, letters),
        validation: TokenDataset.fromTexts(heldOut, letters),
      }),
    )
  })

  test('resumes only with the same data, identified by its content', async () => {
    const out = join(folder, 'run')
    const run = (path: string, steps: number, resume = false) =>
      train(new BigramModel(), {
        data: tokenFiles(path),
        steps,
        out,
        resume,
        schedule: () => 1,
        batchSize: 2,
        sequenceLength: 8,
        progress: false,
        allowChanges: false,
      })
    const first = await tokenizedFolder('c', texts)
    const same = await tokenizedFolder('c', texts)
    const other = await tokenizedFolder('c', [...texts.slice(1), texts[0]])
    const abort = new AbortController()
    await train(new BigramModel(), {
      data: tokenFiles(first),
      steps: 6,
      out,
      schedule: () => 1,
      batchSize: 2,
      sequenceLength: 8,
      progress: false,
      signal: abort.signal,
      onEvent: event => event.type === 'step' && event.step === 3 && abort.abort(),
    })
    await expect(run(other, 6, true)).rejects.toThrow(/data: saved with/)
    expect((await run(same, 6, true)).steps).toBe(6)
  })

  test('rejects tokens of another tokenizer, whatever the order of its JSON fields', async () => {
    const own = { ...letters, toJSON: () => ({ a: 1, b: [2] }) }
    const data = tokenFiles(await tokenizedFolder('d', texts, { tokenizer: own }))
    const options = { data, steps: 1, batchSize: 1, sequenceLength: 8, progress: false }
    await train(new BigramModel(), { ...options, tokenizer: { ...letters, toJSON: () => ({ b: [2], a: 1 }) } })
    await expect(
      train(new BigramModel(), { ...options, tokenizer: { ...letters, toJSON: () => ({ a: 2, b: [2] }) } }),
    ).rejects.toThrow(/training tokens were made with another tokenizer/)
  })

  test('rejects an unfinished or inconsistent folder', async () => {
    const path = await tokenizedFolder('e', texts)
    const manifest = JSON.parse(readFileSync(join(path, 'tokens.json'), 'utf8'))
    const expectError = (changes: object, message: RegExp) => {
      writeFileSync(join(path, 'tokens.json'), JSON.stringify({ ...manifest, ...changes }))
      expect(() => tokenFiles(path)).toThrow(
        expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(message) }),
      )
    }
    const { training } = manifest
    const shards = (change: object) => ({ training: { ...training, shards: [{ ...training.shards[0], ...change }] } })
    expectError({ format: 'x' }, /format is "x"/)
    expectError({ version: 2 }, /version 2/)
    expectError({ vocabSize: -1 }, /vocabSize is -1/)
    expectError({ eos: manifest.vocabSize }, /bos and eos/)
    expectError({ training: null }, /training is not a list/)
    expectError(shards({ name: '../x' }), /training is not a list/)
    expectError(shards({ tokens: 7 }), /records 7 in/)
    writeFileSync(join(path, 'tokens.json'), '{')
    expect(() => tokenFiles(path)).toThrow(/not JSON/)
    rmSync(join(path, 'tokens.json'))
    expect(() => tokenFiles(path)).toThrow(/has no tokens.json/)
    expect(readdirSync(path).length).toBeGreaterThan(10)
  })
})
