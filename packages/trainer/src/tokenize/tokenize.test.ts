import { execFile, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { appendFileSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import * as zlib from 'node:zlib'
import { trainBpe } from '@moe/tokenizer-bpe'
import { parquetWriteFile } from 'hyparquet-writer'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { TokenDataset } from '../data/token-dataset.ts'
import { tokenFiles } from '../data/token-files.ts'
import { drawFor } from './document-draw.ts'
import { type TokenizeOptions, tokenize } from './tokenize.ts'

const fim = { begin: '<fim1>', hole: '<fim2>', end: '<fim3>' }
const words = 'the better angels of our nature 🙂 für alle people\nunion government states'.split(' ')
const documents = Array.from({ length: 300 }, (_, i) =>
  Array.from({ length: 3 + ((i * 7) % 40) }, (_, j) => words[(i * j + j * j + i) % words.length]).join(' '),
)
const tokenizer = trainBpe(documents, {
  vocabSize: 300,
  preTokenizer: 'deepseek-v3',
  specialTokens: ['<s>', '</s>', fim.begin, fim.hole, fim.end],
})

let folder: string
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'tokenize-'))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

let count = 0
const newFolder = () => join(folder, `out-${count++}`)
const file = (name: string, content: string | Uint8Array) => {
  const path = join(folder, name)
  writeFileSync(path, content)
  return path
}
const jsonl = (texts: readonly string[], field = 'text') =>
  texts.map(text => `${JSON.stringify({ [field]: text })}\n`).join('')

/** The names and digests of the files in a folder. */
const contentOf = (path: string) =>
  readdirSync(path)
    .sort()
    .map(
      name =>
        `${name} ${createHash('sha256')
          .update(readFileSync(join(path, name)))
          .digest('hex')}`,
    )

async function tokenized(patterns: string | string[], options: Partial<TokenizeOptions> = {}) {
  const out = newFolder()
  const result = await tokenize(patterns, { tokenizer, threads: 1, out, ...options })
  return { out, result, ...tokenFiles(out) }
}

/** The tokens, document starts and sizes of a stream. */
function shown(stream: ReturnType<typeof tokenFiles>['training']) {
  return {
    tokens: [...stream.read(0, stream.length)],
    starts: Array.from({ length: stream.documents }, (_, i) => stream.startOf(i)),
    textBytes: stream.textBytes,
    vocabSize: stream.vocabSize,
  }
}

const inMemory = (texts: readonly string[]) => {
  const { tokens, starts, textBytes, vocabSize } = TokenDataset.fromTexts(texts, tokenizer)
  return { tokens: [...tokens], starts: [...starts], textBytes, vocabSize }
}

describe('input files', () => {
  test('of JSON lines, compressed or not, and of Parquet give the same tokens as the texts in memory', async () => {
    const expected = inMemory(documents)
    const lines = jsonl(documents)
    const half = lines.indexOf('\n', lines.length / 2) + 1
    const members = Buffer.concat([lines.slice(0, half), lines.slice(half)].map(part => zlib.gzipSync(part)))
    parquetWriteFile({
      filename: join(folder, 'a.parquet'),
      columnData: [
        { name: 'id', data: documents.map((_, i) => i), type: 'INT32' },
        { name: 'text', data: documents, type: 'STRING' },
      ],
      rowGroupSize: 70,
    })
    const paths = [file('a.jsonl', lines), file('a.jsonl.gz', members), join(folder, 'a.parquet')]
    if (zlib.zstdCompressSync !== undefined) {
      const frames = Buffer.concat([lines.slice(0, half), lines.slice(half)].map(part => zlib.zstdCompressSync(part)))
      paths.push(file('a.ndjson.zst', frames))
    }
    for (const path of paths) expect(shown((await tokenized(path)).training), path).toEqual(expected)
  })

  test('of text are one document each, or split at separators with the line ends of the file', async () => {
    const unseparated = [file('b1.txt', '\uFEFFthe union\n'), file('b2.txt', ''), file('b3.txt', 'our states')]
    expect(shown((await tokenized(unseparated)).training)).toEqual(inMemory(['the union\n', 'our states']))
    const separated = [file('c1.txt', 'the\nunion\n\n \n\nstates\n'), file('c2.txt', 'our\r\n\r\npeople')]
    expect(shown((await tokenized(separated, { separator: '\n\n' })).training)).toEqual(
      inMemory(['the\nunion', 'states\n', 'our', 'people']),
    )
  })

  test('of JSON have the text in the selected field, and null or empty texts are left out', async () => {
    const path = file('d.jsonl', `{"body":"the union","n":1}\n\n{"body":null}\r\n{"body":""}\n{"body":"states"}`)
    expect(shown((await tokenized(path, { field: 'body' })).training)).toEqual(inMemory(['the union', 'states']))
    await expect(tokenized(path)).rejects.toThrow(/line at byte 0 has no text; its fields are body, n.*--field/)
  })

  test('that are invalid are errors with the position', async () => {
    const bad = async (name: string, content: string | Uint8Array, message: RegExp) =>
      expect(tokenized(file(name, content)), name).rejects.toThrow(
        expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(message) }),
      )
    await bad('e1.jsonl', '{"text":"ä"}\n{"text":', /e1.jsonl: the line at byte 14 is not JSON/)
    await bad('e2.jsonl', '{"text":"a"}\n[1]\n', /line at byte 13 has no text/)
    await bad('e3.jsonl', '{"text":7}\n', /a text that is not a string; its fields are text/)
    await bad('e4.txt', 'ab\0c', /byte 2 is NUL/)
    await bad('e5.txt', Uint8Array.of(65, 0xff, 66), /not UTF-8/)
    await bad(
      'e6.jsonl.gz',
      zlib.gzipSync(jsonl(documents)).subarray(0, 200),
      /e6.*cannot read the file: unexpected end/,
    )
    await bad('e7.jsonl.gz', 'no gzip', /cannot read/)
    if (zlib.zstdCompressSync !== undefined) {
      const frame = zlib.zstdCompressSync(jsonl(documents))
      await bad('e10.jsonl.zst', frame.subarray(0, 200), /e10.*cannot read the file/)
      await bad('e11.jsonl.zst', Buffer.concat([frame, Buffer.from('garbage behind')]), /e11.*cannot read the file/)
    }
    await bad('e8.parquet', 'no parquet', /e8.parquet: cannot read the file/)
    await bad('e9.txt', '', /no text in 1 files/)
    parquetWriteFile({
      filename: join(folder, 'f.parquet'),
      columnData: [{ name: 'body', data: ['a'], type: 'STRING' }],
    })
    await expect(tokenized(join(folder, 'f.parquet'))).rejects.toThrow(/no column text, only body/)
  })
})

describe('random choices', () => {
  test('hold out a fraction of documents by their text only, so that copies stay together', async () => {
    const copies = [...documents, ...documents]
    const { training, validation, result } = await tokenized(file('g.jsonl', jsonl(copies)), { validation: 0.2 })
    const heldOut = documents.filter(text => drawFor(text, { validation: 0.2, fimRate: 0, seed: 0 }).heldOut)
    const distinct = new Set(documents).size
    expect(heldOut.length).toBeGreaterThan(0.1 * distinct)
    expect(heldOut.length).toBeLessThan(0.3 * documents.length)
    const kept = documents.filter(text => !heldOut.includes(text))
    expect(shown(training)).toEqual(inMemory([...kept, ...kept]))
    expect(validation && shown(validation)).toEqual(inMemory([...heldOut, ...heldOut]))
    expect(result.textBytes).toBe(copies.reduce((sum, text) => sum + Buffer.byteLength(text), 0))
    const other = documents.filter(text => drawFor(text, { validation: 0.2, fimRate: 0, seed: 1 }).heldOut)
    expect(other).not.toEqual(heldOut)
  })

  test('apply fill-in-the-middle at its rate, as prefix, suffix, middle, and encode spelled special tokens as text', async () => {
    const spelled = [...documents, '<fim1>a</s>b<fim2>']
    const options = { fimRate: 0.5, fimTokens: fim, validation: 0.2 }
    const { training, validation } = await tokenized(file('h.jsonl', jsonl(spelled)), options)
    const [begin, hole, end] = Object.values(fim).map(token => tokenizer.tokenToId(token) as number)
    let filled = 0
    const seen: string[] = []
    for (let i = 0; i < training.documents; i++) {
      const from = training.startOf(i)
      const ids = [...training.read(from, Math.min(training.length, training.startOf(i + 1)) - from)]
      expect([ids[0], ids.at(-1)]).toEqual([tokenizer.tokenToId('<s>'), tokenizer.tokenToId('</s>')])
      const inner = ids.slice(1, -1)
      if (inner[0] !== begin) {
        seen.push(tokenizer.decode(inner))
        continue
      }
      filled++
      const [a, b] = [inner.indexOf(hole), inner.indexOf(end)]
      const part = (from: number, to?: number) => tokenizer.decode(inner.slice(from, to))
      seen.push(part(1, a) + part(b + 1) + part(a + 1, b))
    }
    expect(seen).toEqual(spelled.filter(text => !drawFor(text, { ...options, seed: 0 }).heldOut))
    expect(filled).toBeGreaterThan(0.4 * training.documents)
    expect(filled).toBeLessThan(0.6 * training.documents)
    expect([...(validation?.read(0, validation.length) ?? [])]).not.toContain(begin)
    await expect(tokenized(file('h.jsonl', jsonl(spelled)), { fimRate: 0.1 })).rejects.toThrow(
      /no token <｜fim▁begin｜>/,
    )
  })
})

describe('token files', () => {
  test('are identical for any number of threads, and shards are bounded', async () => {
    const path = file('i.jsonl', jsonl(documents))
    const options = { validation: 0.1, fimRate: 0.3, fimTokens: fim, shardTokens: 500 }
    const one = await tokenized(path, options)
    const three = await tokenized(path, { ...options, threads: 3 })
    expect(contentOf(three.out)).toEqual(contentOf(one.out))
    const bins = readdirSync(one.out).filter(name => /^training-\d+.bin$/.test(name))
    expect(bins.length).toBeGreaterThan(5)
    for (const name of bins) expect(readFileSync(join(one.out, name)).length).toBeLessThanOrEqual(2 * 500)
    const large = await tokenized(path, { validation: 0.1, fimRate: 0.3, fimTokens: fim })
    expect(shown(large.training)).toEqual(shown(one.training))
    // A document larger than a shard gets its own shard.
    const tiny = await tokenized(file('j.jsonl', jsonl(documents.slice(0, 20))), { shardTokens: 10 })
    expect(shown(tiny.training)).toEqual(inMemory(documents.slice(0, 20)))
  })

  test('have 32-bit ids if the vocabulary needs them', async () => {
    const wide = { vocabSize: 70_000, encode: (text: string) => Array.from(text, (_, i) => 69_000 + i) }
    const { training } = await tokenized(file('k.txt', 'abc'), { tokenizer: wide, eos: 69_999, bos: null })
    expect([...training.read(0, 4)]).toEqual([69_000, 69_001, 69_002, 69_999])
    expect(training.unpredictable).toBe(1)
  })

  test('are the same if an aborted call is continued', async () => {
    // More than one batch: documents of some megabytes.
    const long = Array.from({ length: 12 }, (_, i) => documents.slice(i).join('\n').repeat(40))
    const paths = [file('l1.jsonl', jsonl(long.slice(0, 7))), file('l2.jsonl.gz', zlib.gzipSync(jsonl(long.slice(7))))]
    const options = { validation: 0.3, shardTokens: 100_000 }
    const uninterrupted = await tokenized(paths, options)
    const out = newFolder()
    const stopped = new Error('enough')
    let calls = 0
    let reported = 0
    for (;;) {
      const abort = new AbortController()
      const onProgress = ({ bytes, fromBytes }: { bytes: number; fromBytes: number }) => {
        expect(fromBytes).toBe(reported)
        reported = bytes
        abort.abort(stopped)
      }
      const before = reported
      const call = tokenize(paths, { tokenizer, threads: 1, out, ...options, signal: abort.signal, onProgress })
      const error = await call.then(
        () => null,
        (error: unknown) => error,
      )
      calls++
      if (error === null) break
      expect(error).toBe(stopped)
      expect(reported).toBeGreaterThanOrEqual(before)
      expect(() => tokenFiles(out)).toThrow(/no tokens.json/)
      // As after a killed process: unfinished shards contain more than was recorded.
      const names = readdirSync(out)
      for (const name of names)
        if (/\.(bin|lengths)$/.test(name) && !names.includes(name.replace(/\.\w+$/, '.idx')))
          appendFileSync(join(out, name), 'more')
      writeFileSync(join(out, 'training-00099.bin'), 'of a shard that was not recorded')
    }
    expect(calls).toBeGreaterThan(2)
    expect(contentOf(out)).toEqual(contentOf(uninterrupted.out))
  }, 60_000)

  test('are not written again if they are complete, and other settings are an error', async () => {
    const path = file('m.jsonl', jsonl(documents))
    const { out, result } = await tokenized(path)
    const never = {
      ...tokenizer,
      vocabSize: tokenizer.vocabSize,
      encode: () => expect.unreachable(),
      toJSON: () => tokenizer.toJSON(),
      tokenToId: (token: string) => tokenizer.tokenToId(token),
    }
    expect(await tokenize(path, { tokenizer: never, out, threads: 1 })).toEqual({
      ...result,
      seconds: expect.any(Number),
    })
    await expect(tokenize(path, { tokenizer, out, threads: 1, seed: 4, validation: 0.1 })).rejects.toThrow(
      /validation: was 0, now 0.1\n\s+seed: was none, now 4.*overwrite/s,
    )
    appendFileSync(path, jsonl(['more']))
    await expect(tokenize(path, { tokenizer, out, threads: 1 })).rejects.toThrow(/files: was 1 of/)
    await tokenize(path, { tokenizer, out, threads: 1, overwrite: true })
    expect(tokenFiles(out).training.documents).toBe(documents.length + 1)
  })

  test('need valid settings, of which all invalid ones are reported', async () => {
    const path = file('n.txt', 'a')
    await expect(tokenized(path, { shardTokens: 0, validation: 1, separator: '', threads: 0.5 })).rejects.toThrow(
      /threads is 0.5.*shardTokens is 0.*validation is 1.*separator/,
    )
    await expect(tokenized(path, { tokenizer: { encode: () => [1] } })).rejects.toThrow(/vocabSize is undefined/)
    await expect(tokenized(path, { tokenizer: { encode: () => [5], vocabSize: 5 } })).rejects.toThrow(/returned id 5/)
  })
})

describe('moe-trainer tokenize', () => {
  const cli = fileURLToPath(new URL('../cli.ts', import.meta.url))
  const started = (...args: string[]) =>
    new Promise<{ code: number; stdout: string; stderr: string }>(done =>
      execFile(process.execPath, [cli, 'tokenize', ...args], (error, stdout, stderr) =>
        done({ code: Number(error?.code ?? 0), stdout, stderr }),
      ),
    )

  test('writes the same files as the function, and continues after SIGKILL', async () => {
    await tokenizer.save(join(folder, 'tokenizer.json'))
    mkdirSync(join(folder, 'corpus'))
    const long = Array.from({ length: 40 }, (_, i) => documents.slice(i).join('\n').repeat(12))
    for (let i = 0; i < 4; i++)
      writeFileSync(join(folder, 'corpus', `${i}.jsonl`), jsonl(long.slice(10 * i, 10 * i + 10)))
    const uninterrupted = await tokenized(join(folder, 'corpus/*.jsonl'), { validation: 0.1, shardTokens: 1_000_000 })
    const out = newFolder()
    const args = [
      join(folder, 'corpus/*.jsonl'),
      '--tokenizer',
      folder,
      '--out',
      out,
      '--validation',
      '0.1',
      '--shard-tokens',
      '1000000',
      '--threads',
      '1',
      '--json',
    ]
    const killed = spawn(process.execPath, [cli, 'tokenize', ...args])
    const hasBegun = () => {
      try {
        return readdirSync(out).includes('training-00000.bin')
      } catch {
        return false
      }
    }
    while (!hasBegun() && killed.exitCode === null) await new Promise(done => setTimeout(done, 5))
    killed.kill('SIGKILL')
    await new Promise(done => killed.once('exit', done))
    const { code, stdout } = await started(...args)
    expect(code).toBe(0)
    expect(JSON.parse(stdout)).toMatchObject({ trainingTokens: uninterrupted.result.trainingTokens })
    expect(contentOf(out)).toEqual(contentOf(uninterrupted.out))
  }, 60_000)

  test('exits with 2 for missing options, and with 1 if no file matches', async () => {
    expect(await started('x.txt')).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('missing --tokenizer PATH'),
    })
    expect(await started('nothing*.txt', '--tokenizer', folder, '--out', newFolder())).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('no file matches'),
    })
  }, 30_000)
})

test("works without FileHandle.sync, which Yarn's Plug'n'Play does not implement", async () => {
  const source = file('plug-and-play.jsonl', jsonl(documents))
  const handle = await open(source)
  const sync = vi.spyOn(Object.getPrototypeOf(handle), 'sync').mockImplementation(() => {
    throw new Error('Method not implemented.')
  })
  try {
    const { training } = await tokenized(source)
    expect(shown(training)).toEqual(inMemory(documents))
  } finally {
    sync.mockRestore()
    await handle.close()
  }
})
