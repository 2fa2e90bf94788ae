import { mkdir, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import fc from 'fast-check'
import { afterEach, describe, expect, test, vi } from 'vitest'
import { letters, letterTexts, nextTokens, removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { textFiles, texts } from './corpus.ts'
import { utf8Bytes } from './documents.ts'
import { evaluationWindows } from './evaluation-windows.ts'
import { TokenDataset } from './token-dataset.ts'
import { TrainingOrder } from './training-order.ts'

afterEach(removeTemporaryFolders)

/** Documents of distinct tokens, each its own position. */
const numbered = fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 12 }).map(lengths => {
  let next = 0
  return lengths.map(length => Array.from({ length }, () => next++))
})
const usable = numbered.filter(documents => documents.flat().length >= 2)

describe('texts', () => {
  test('holds out whole documents, the same for the same seed', () => {
    const documents = letterTexts(40, 20)
    const corpus = texts(documents, { validation: 0.1, seed: 4 })
    expect(corpus.validation).toHaveLength(4)
    expect([...corpus.training, ...corpus.validation].sort()).toEqual([...documents].sort())
    expect(texts(documents, { validation: 0.1, seed: 4 })).toEqual(corpus)
    expect(texts(documents, { validation: 0.1, seed: 5 }).validation).not.toEqual(corpus.validation)
  })

  test('cuts a single document at a line end', () => {
    const text = Array.from({ length: 50 }, (_, i) => `line ${i}\n`).join('')
    const { training, validation } = texts([text], { validation: 0.1 })
    expect(training[0] + validation[0]).toBe(text)
    expect(training[0].endsWith('\n')).toBe(true)
    expect(validation[0].length / text.length).toBeCloseTo(0.1, 1)
  })

  test('uses given held-out documents unchanged', () => {
    expect(texts(['a', '', 'b'], { validation: ['c'] })).toEqual({ training: ['a', 'b'], validation: ['c'] })
  })

  test.each([
    ['an empty list', [], /has no documents/],
    ['empty texts', ['', ''], /all 2 documents .* are empty/],
    ['binary content', ['fine', 'bad\0'], /document 1 .* NUL/],
    ['a number', [3 as unknown as string], /document 0 .* number/],
    ['a single string', 'one text', /documents is a single string; pass a list/],
    ['a missing argument', undefined as unknown as string[], /documents is undefined/],
  ])('rejects %s', (_, documents, message) => {
    expect(() => texts(documents)).toThrow(
      expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(message) }),
    )
  })
})

describe('textFiles', () => {
  async function folder(files: Record<string, string | Uint8Array>) {
    const path = await temporaryFolder()
    await mkdir(join(path, 'sub'))
    for (const [name, content] of Object.entries(files)) await writeFile(join(path, name), content)
    return path
  }

  test('reads patterns and paths in order, and holds out the files of a pattern', async () => {
    const cwd = await folder({ 'b.txt': 'second', 'a.txt': '\uFEFFfirst', 'sub/c.txt': 'third', 'd.md': 'other' })
    expect(textFiles('**/*.txt', { cwd }).training).toEqual(['first', 'second', 'third'])
    expect(textFiles(['b.txt', join(cwd, 'd.md')], { cwd }).training).toEqual(['second', 'other'])
    const split = textFiles('**/*.txt', { cwd, validation: { files: 'sub/*' } })
    expect(split).toEqual({ training: ['first', 'second'], validation: ['third'] })
  })

  test('holds out a file given by another path, through a link', async () => {
    const cwd = await folder({ 'sub/a.txt': 'first', 'b.txt': 'second' })
    // A link to a folder, because links to files need a privilege on Windows.
    await symlink(join(cwd, 'sub'), join(cwd, 'held-out'), 'junction')
    const split = textFiles(['sub/*.txt', 'b.txt'], { cwd, validation: { files: 'held-out/a.txt' } })
    expect(split).toEqual({ training: ['second'], validation: ['first'] })
  })

  test('accepts patterns with the separators of Windows', async () => {
    vi.doMock('node:path', async original => ({ ...(await original<object>()), sep: '\\' }))
    vi.resetModules()
    try {
      const windows = await import('./corpus.ts')
      const cwd = await folder({ 'a.txt': 'first', 'sub/c.txt': 'third' })
      expect(windows.textFiles('**\\*.txt', { cwd }).training).toEqual(['first', 'third'])
      expect(() => windows.textFiles('sub\\*.md', { cwd })).toThrow(/no file matches sub\\\*\.md/)
    } finally {
      vi.doUnmock('node:path')
      vi.resetModules()
    }
  })

  test('splits files into documents', async () => {
    const cwd = await folder({ 'a.txt': 'one\n---\ntwo\n---\n' })
    expect(textFiles('a.txt', { cwd, separator: '\n---\n' }).training).toEqual(['one', 'two'])
  })

  test('matches a line feed in the separator with the line ends of the file', async () => {
    const cwd = await folder({ 'crlf.txt': 'one\r\nmore\r\n\r\ntwo\r\n', 'lf.txt': 'a\n\nb', 'long.txt': 'a b' })
    const of = (file: string, separator: string) => textFiles(file, { cwd, separator }).training
    expect(of('crlf.txt', '\n')).toEqual(['one', 'more', 'two'])
    expect(of('crlf.txt', '\n\n')).toEqual(['one\r\nmore', 'two\r\n'])
    expect(of('crlf.txt', '\r\n\r\n')).toEqual(['one\r\nmore', 'two\r\n'])
    expect(of('lf.txt', '\n\n')).toEqual(['a', 'b'])
    expect(of('long.txt', '\n')).toEqual(['a b'])
  })

  test('splits by a string as by an equal regular expression', async () => {
    const content = '\uFEFFüne🙂🙂deux🙂🙂🙂trois🙂🙂 🙂🙂quatre\n'
    const cwd = await folder({ 'a.txt': content })
    const parts = ['üne', 'deux', '🙂trois', 'quatre\n']
    expect(textFiles('a.txt', { cwd, separator: '🙂🙂' }).training).toEqual(parts)
    expect(textFiles('a.txt', { cwd, separator: /🙂🙂/ }).training).toEqual(parts)
  })

  test('reads files larger than a string can be, if each document fits', async () => {
    const cwd = await folder({ 'a.txt': 'first\nsecond\nthird' })
    const decode = Buffer.prototype.toString
    // As if strings had at most 8 characters.
    const limited = vi.spyOn(Buffer.prototype, 'toString').mockImplementation(function (this: Buffer, encoding) {
      if (this.length > 8) throw Object.assign(new Error('too long'), { code: 'ERR_STRING_TOO_LONG' })
      return decode.call(this, encoding)
    })
    try {
      expect(textFiles('a.txt', { cwd, separator: '\n' }).training).toEqual(['first', 'second', 'third'])
      expect(() => textFiles('a.txt', { cwd })).toThrow(
        expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(/document of 18 bytes.*separator/) }),
      )
    } finally {
      limited.mockRestore()
    }
  })

  test.each([
    ['a pattern without files', {}, '*.txt', /no file matches \*\.txt/],
    ['a folder', {}, 'sub', /sub is a folder.*sub\/\*\*\/\*\.txt/],
    ['empty files', { 'a.txt': '' }, '*.txt', /are empty/],
    ['bytes with NUL', { 'a.txt': new Uint8Array([65, 66, 0, 1]) }, '*.txt', /a\.txt is binary: byte 2/],
    ['other encodings', { 'a.txt': new Uint8Array([65, 0xe9, 66]) }, '*.txt', /a\.txt is not UTF-8/],
  ])('rejects %s', async (_, files, pattern, message) => {
    const cwd = await folder(files as Record<string, string>)
    expect(() => textFiles(pattern, { cwd })).toThrow(
      expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(message) }),
    )
  })
})

test('textFiles and texts reject invalid paths and options', async () => {
  const cwd = await temporaryFolder()
  await writeFile(join(cwd, 'a.txt'), 'first')
  const read = textFiles as (...input: unknown[]) => unknown
  const url = pathToFileURL(cwd)
  for (const args of [[], [[3]], [url], ['a.txt', { cwd, validation: 'b.txt' }], ['a.txt', { cwd: 3 }]]) {
    expect(() => read(...args)).toThrow(expect.objectContaining({ code: 'E_ATTR', op: 'textFiles' }))
  }
  expect(textFiles('a.txt', { cwd: url }).training).toEqual(['first'])
  for (const make of [read, texts as typeof read]) {
    expect(() => make(['a.txt'], null)).toThrow('expected an options object, got null')
    expect(() => make(['a.txt'], { cwd, sed: 1 })).toThrow(expect.objectContaining({ code: 'E_CONFIG' }))
  }
})

describe('TokenDataset', () => {
  test('rejects anything but a list of texts and a tokenizer', () => {
    const make = TokenDataset.fromTexts as (...input: unknown[]) => unknown
    expect(() => make('abc', letters)).toThrow(/documents is a single string; pass a list/)
    expect(() => make(['abc'], 'tokenizer.json')).toThrow(
      /the tokenizer is tokenizer.json; pass the result of trainBpe/,
    )
    expect(() => make(['abc'], {})).toThrow(/an object without encode/)
  })

  test('adds begin and end tokens to documents, and counts bytes', () => {
    const none = [undefined] as unknown as string[]
    expect(() => TokenDataset.fromTexts(none, letters)).toThrow(expect.objectContaining({ code: 'E_DATA' }))
    const data = TokenDataset.fromTexts(['ab', 'c'], letters)
    expect([...data.tokens]).toEqual([10, 0, 1, 11, 10, 2, 11])
    expect([...data.starts]).toEqual([0, 4])
    expect(data.textBytes).toBe(3)
    expect(data.predictable).toBe(5)
    expect(data.unpredictable).toBe(0)
  })

  test('uses the end token as begin token if there is no other', () => {
    const tokens = (options: object) => [...TokenDataset.fromTexts(['ab'], letters, options).tokens]
    expect(tokens({ bos: undefined, eos: 7 })).toEqual([10, 0, 1, 7])
    expect(tokens({ bos: null, eos: null })).toEqual([0, 1])
    const plain = { encode: letters.encode }
    expect([...TokenDataset.fromTexts(['ab'], plain, { eos: 7 }).tokens]).toEqual([7, 0, 1, 7])
    expect(TokenDataset.fromTexts(['ab', 'c'], plain).unpredictable).toBe(2)
  })

  test('rejects too few tokens, and ids outside the vocabulary', () => {
    const code = expect.objectContaining({ code: 'E_DATA' })
    expect(() => TokenDataset.fromTokens([[1]])).toThrow(code)
    expect(() => TokenDataset.fromTokens([])).toThrow(code)
    expect(() => TokenDataset.fromTokens([[1, 2, 9]], { vocabSize: 9 })).toThrow(/token 2 of the stream is 9/)
    expect(() => TokenDataset.fromTokens([[1, -2]])).toThrow(code)
  })

  test('joins documents of any length', () => {
    const documents = [3, 200_000, 1, 60_000].map((length, i) => new Int32Array(length).fill(i + 1))
    const { tokens } = TokenDataset.fromTokens(documents)
    expect(Buffer.from(tokens.buffer).equals(Buffer.concat(documents.map(({ buffer }) => Buffer.from(buffer))))).toBe(
      true,
    )
  })

  test('finds the document of every token', () => {
    fc.assert(
      fc.property(usable, documents => {
        const data = TokenDataset.fromTokens(documents)
        const found = documents.flatMap((ids, i) => ids.map(() => i))
        expect(Array.from(data.tokens, (_, i) => data.documentAt(i))).toEqual(found)
      }),
    )
  })
})

describe('TrainingOrder', () => {
  const sizes = fc.record({
    sequenceLength: fc.integer({ min: 1, max: 9 }),
    lookahead: fc.integer({ min: 1, max: 3 }),
    batchSize: fc.integer({ min: 1, max: 4 }),
    accumulate: fc.integer({ min: 1, max: 3 }),
    seed: fc.integer({ min: 0, max: 1000 }),
  })

  test('has every token except the first of each document as target once per epoch', () => {
    fc.assert(
      fc.property(usable, sizes, (documents, options) => {
        const data = TokenDataset.fromTokens(documents)
        // With one row per step, an epoch is a whole number of steps.
        const order = new TrainingOrder(data, { ...options, batchSize: 1, accumulate: 1 })
        for (const epoch of [0, 1]) {
          const targets: number[] = []
          for (let i = 0; i < order.windows; i++) {
            const [batch] = order.step(epoch * order.windows + i)
            const length = options.sequenceLength + 1
            const first = { ...batch, tokens: batch.tokens.subarray(0, length), length }
            targets.push(...nextTokens(first, 0).targets.filter(id => id >= 0))
          }
          const expected = documents.flatMap(ids => ids.slice(1))
          expect(targets.sort((a, b) => a - b)).toEqual(expected)
        }
      }),
    )
  })

  test('has rows of consecutive tokens with their documents, and padding without targets', () => {
    fc.assert(
      fc.property(usable, sizes, fc.integer({ min: 0, max: 50 }), (documents, options, step) => {
        const data = TokenDataset.fromTokens(documents)
        for (const { tokens, documents: numbers, rows, length } of new TrainingOrder(data, options).step(step)) {
          expect(length).toBe(options.sequenceLength + options.lookahead)
          for (let row = 0; row < rows; row++) {
            const from = tokens[row * length]
            for (let i = 0; i < length; i++) {
              const at = row * length + i
              const inside = from + i < data.tokens.length
              if (inside) expect([tokens[at], numbers[at]]).toEqual([from + i, data.documentAt(from + i)])
              else if (i > 0) expect(numbers[at]).not.toBe(numbers[at - 1])
            }
          }
        }
      }),
    )
  })

  test('depends only on step and seed, and differs between epochs', () => {
    const data = TokenDataset.fromTokens([Array.from({ length: 400 }, (_, i) => i)])
    const options = { sequenceLength: 4, lookahead: 1, batchSize: 10, seed: 1 }
    const order = new TrainingOrder(data, options)
    const forwards = Array.from({ length: 25 }, (_, step) => [...order.step(step)[0].tokens])
    const fresh = new TrainingOrder(data, options)
    const backwards = Array.from({ length: 25 }, (_, i) => [...fresh.step(24 - i)[0].tokens]).reverse()
    expect(backwards).toEqual(forwards)
    expect(forwards[0]).not.toEqual(forwards[10])
    expect([...new TrainingOrder(data, { ...options, seed: 2 }).step(0)[0].tokens]).not.toEqual(forwards[0])
  })

  test('divides the rows of one batch between ranks and micro-batches', () => {
    fc.assert(
      fc.property(
        usable,
        sizes,
        fc.integer({ min: 1, max: 4 }),
        fc.integer({ min: 0, max: 20 }),
        (documents, options, world, step) => {
          const data = TokenDataset.fromTokens(documents)
          const { batchSize, accumulate } = options
          const oneBatch = new TrainingOrder(data, {
            ...options,
            batchSize: batchSize * accumulate * world,
            accumulate: 1,
          })
          const parts = Array.from({ length: world }, (_, rank) =>
            new TrainingOrder(data, { ...options, rank, world }).step(step),
          )
          const joined = Array.from({ length: accumulate }, (_, micro) =>
            parts.flatMap(part => [...part[micro].tokens]),
          ).flat()
          expect(joined).toEqual([...oneBatch.step(step)[0].tokens])
        },
      ),
    )
  })

  test('uses the windows in the same order for a growing batch, whichever step is requested first', () => {
    fc.assert(
      fc.property(
        usable,
        sizes,
        fc.array(fc.integer({ min: 1, max: 4 }), { minLength: 1, maxLength: 8 }),
        fc.integer({ min: 1, max: 3 }),
        (documents, options, counts, world) => {
          const data = TokenDataset.fromTokens(documents)
          const { batchSize, sequenceLength } = options
          const steady = new TrainingOrder(data, { ...options, accumulate: 1, batchSize: batchSize * world })
          const growing = Array.from(
            { length: world },
            (_, rank) => new TrainingOrder(data, { ...options, rank, world, accumulate: step => counts[step] + 0.4 }),
          )
          // From the last step, as for a resumed run.
          for (let step = counts.length - 1; step >= 0; step--) {
            const before = counts.slice(0, step).reduce((sum, count) => sum + count, 0)
            const parts = growing.map(order => order.step(step))
            const joined = Array.from({ length: counts[step] }, (_, micro) =>
              parts.flatMap(part => [...part[micro].tokens]),
            )
            expect(joined).toEqual(joined.map((_, micro) => [...steady.step(before + micro)[0].tokens]))
            expect(parts.map(part => part.length)).toEqual(parts.map(() => counts[step]))
            expect(growing[0].tokensIn(step)).toBe(before * batchSize * sequenceLength)
            expect(growing[0].epochs(step)).toBe(steady.epochs(before))
          }
        },
      ),
    )
  })

  test('rejects invalid sizes', () => {
    const data = TokenDataset.fromTokens([[1, 2, 3]])
    for (const accumulate of [() => 0.4, () => Number.NaN, () => undefined as never])
      expect(() =>
        new TrainingOrder(data, { sequenceLength: 2, lookahead: 1, batchSize: 1, accumulate }).step(1),
      ).toThrow(/accumulate\(0\) is/)
    const good = { sequenceLength: 2, lookahead: 1, batchSize: 1 }
    const code = expect.objectContaining({ code: 'E_CONFIG' })
    expect(() => new TrainingOrder(data, { ...good, batchSize: 0 })).toThrow(code)
    expect(() => new TrainingOrder(data, { ...good, sequenceLength: 1.5 })).toThrow(code)
    expect(() => new TrainingOrder(data, { ...good, rank: 2, world: 2 })).toThrow(code)
  })
})

describe('evaluationWindows', () => {
  const sizes = fc.record({
    sequenceLength: fc.integer({ min: 2, max: 17 }),
    lookahead: fc.integer({ min: 1, max: 3 }),
    batchSize: fc.integer({ min: 1, max: 5 }),
  })
  const targetsOf = (data: TokenDataset, options: Parameters<typeof evaluationWindows>[1]) =>
    [...evaluationWindows(data, options)].flatMap(({ batch, from }) =>
      Array.from({ length: batch.rows }, (_, row) => {
        const at = row * batch.length
        const length = options.sequenceLength + 1
        const part = (array: Int32Array) => array.subarray(at, at + length)
        const one = { tokens: part(batch.tokens), documents: part(batch.documents), rows: 1, length }
        return [...nextTokens(one, from).targets].filter(id => id >= 0)
      }).flat(),
    )

  test('predicts every token except the first of each document exactly once', () => {
    fc.assert(
      fc.property(usable, sizes, (documents, options) => {
        const targets = targetsOf(TokenDataset.fromTokens(documents), options)
        expect(targets.sort((a, b) => a - b)).toEqual(documents.flatMap(ids => ids.slice(1)))
      }),
    )
  })

  test('selects windows from all parts of the data for a limit', () => {
    const data = TokenDataset.fromTokens([Array.from({ length: 1000 }, (_, i) => i)])
    const targets = targetsOf(data, { sequenceLength: 10, lookahead: 1, batchSize: 3, limit: 100 })
    expect(targets.length).toBe(105)
    expect(new Set(targets).size).toBe(targets.length)
    expect(targets.filter(id => id > 500).length).toBeGreaterThan(40)
  })
})

test('UTF-8 byte counts equal those of an encoder, including unpaired surrogates', () => {
  const units = fc.array(
    fc.oneof(fc.constantFrom(0x41, 0x7f, 0x80, 0x7ff, 0x800, 0xd7ff, 0xd800, 0xdbff, 0xdc00, 0xdfff, 0xe000)),
  )
  fc.assert(
    fc.property(units, codes => {
      const text = String.fromCharCode(...codes)
      expect(utf8Bytes(text)).toBe(new TextEncoder().encode(text).length)
    }),
    { numRuns: 1000 },
  )
})
