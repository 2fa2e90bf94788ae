import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { describe, expect, test } from 'vitest'
import { BpeTokenizer, type TrainBpeOptions, trainBpe, trainBpeAsync } from './index.ts'

const CORPUS = [
  'We the People of the United States, in Order to form a more perfect Union,\nestablish Justice, insure domestic Tranquility.',
  'The better angels of our nature. The people, by the people, for the people.\n\n1863, 1776 and 2026.',
  '人民的、人民によって、人民のために。🙂👍🏽 naïve café',
]
const train = (options: Partial<TrainBpeOptions> = {}) =>
  trainBpe(CORPUS, { vocabSize: 320, minFrequency: 1, ...options })

describe('a trained tokenizer', () => {
  test('decodes to the encoded text', () => {
    const tokenizer = train()
    for (const text of [...CORPUS, '', '\0\u0001 \u200d\t\r\n', 'ÿ\u{10ffff}']) {
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text)
    }
    expect(tokenizer.encode('the people').length).toBeLessThan('the people'.length)
  })

  test('assigns ids to special tokens, then bytes, then merges', () => {
    const tokenizer = train({ specialTokens: ['<|bos|>', '<|eos|>'] })
    expect(tokenizer.vocabSize).toBe(320)
    expect(tokenizer.mergeCount).toBe(320 - 256 - 2)
    expect(tokenizer.tokenToId('<|eos|>')).toBe(1)
    expect(tokenizer.idToToken(2)).toBe('!')
    expect([...tokenizer.tokenBytes(tokenizer.tokenToId('Ġ')!)]).toEqual([0x20])
  })

  test('recognizes special tokens in a text by default', () => {
    const tokenizer = train({ specialTokens: ['<|eos|>'] })
    const text = 'the<|eos|>people'
    expect([...tokenizer.encode(text)]).toContain(0)
    expect([...tokenizer.encode(text, { parseSpecialTokens: false })]).not.toContain(0)
    expect(tokenizer.decode(tokenizer.encode(text))).toBe(text)
    expect(tokenizer.decode(tokenizer.encode(text), { skipSpecialTokens: true })).toBe('thepeople')
    expect(tokenizer.decode(tokenizer.encode(text, { parseSpecialTokens: false }))).toBe(text)
  })

  test('does not depend on the order of the texts', () => {
    const backwards = trainBpe([...CORPUS].reverse(), { vocabSize: 320, minFrequency: 1 })
    expect(backwards.toJSON()).toEqual(train().toJSON())
  })

  test('is saved to paths and file URLs only', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'moe-tokenizer-'))
    try {
      const tokenizer = train()
      const url = pathToFileURL(join(folder, 'a ü#%.json'))
      await tokenizer.save(url)
      expect(await readdir(folder)).toEqual(['a ü#%.json'])
      expect((await BpeTokenizer.fromFile(url)).toJSON()).toEqual(tokenizer.toJSON())
      const nowhere = join(folder, 'none', 'a.json')
      await expect(tokenizer.save(nowhere)).rejects.toMatchObject({
        code: 'E_FORMAT',
        op: nowhere,
        message: expect.stringMatching(/cannot be written: .*ENOENT.*; create its folder, or choose another path$/),
      })
      await expect(tokenizer.save(folder)).rejects.toThrow(/cannot be written/)
      const partial = (name: string) => name.startsWith(basename(folder)) && name.endsWith('.partial')
      expect((await readdir(join(folder, '..'))).filter(partial)).toEqual([])
      // The path of a URL is not a file path on Windows, nor for other schemes.
      await expect(tokenizer.save(new URL('https://example.com/a.json'))).rejects.toThrow(/scheme file/)
    } finally {
      await rm(folder, { recursive: true })
    }
  })

  test('is the same after saving and loading', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'moe-tokenizer-'))
    try {
      const tokenizer = train({ specialTokens: ['<|eos|>'] })
      const path = join(folder, 'tokenizer.json')
      await Promise.all([tokenizer.save(path), tokenizer.save(path)])
      for (const none of ['nothing.json', undefined as unknown as string, folder]) {
        const error = await BpeTokenizer.fromFile(none).catch(error => error)
        expect(error).toMatchObject({ name: 'TokenizerError', code: 'E_FORMAT', op: `${none}` })
      }
      const loaded = await BpeTokenizer.fromFile(path)
      expect(loaded.toJSON()).toEqual(tokenizer.toJSON())
      expect(loaded.encode(CORPUS[2])).toEqual(tokenizer.encode(CORPUS[2]))
      expect(JSON.parse(await readFile(path, 'utf8')).version).toBe('1.0')
      expect(await readdir(folder)).toEqual(['tokenizer.json'])
    } finally {
      await rm(folder, { recursive: true })
    }
  })

  test('decodes a stream without splitting characters', () => {
    const tokenizer = train()
    const stream = tokenizer.createDecodeStream()
    let text = ''
    for (const id of tokenizer.encode(CORPUS[2])) {
      const part = stream.push(id)
      expect(part).not.toContain('\ufffd')
      text += part
    }
    expect(text + stream.end()).toBe(CORPUS[2])
    stream.push(tokenizer.encode('🙂')[0])
    expect(stream.end()).toBe('\ufffd')
  })

  test('encodes lone surrogates as replacement characters', () => {
    const tokenizer = train()
    expect(tokenizer.decode(tokenizer.encode('a\ud800b'))).toBe('a\ufffdb')
  })

  test('rejects an unknown id', () => {
    expect(() => train().decode([320])).toThrow('decode: unknown id 320, the vocabulary has 320')
  })
})

describe('training', () => {
  test('rejects invalid options', () => {
    expect(() => train({ vocabSize: 257, specialTokens: ['a|', 'b|'] })).toThrow(
      'vocabSize 257 is smaller than 256 bytes + 2 special tokens',
    )
    expect(() => train({ preTokenizer: 'gpt5' as never })).toThrow('unknown preTokenizer "gpt5"; use one of')
    expect(() => train({ specialTokens: ['<a>', '<a>'] })).toThrow('"<a>" is listed twice')
    // Unknown flags and values would be saved as they are.
    for (const [flags, problem] of [
      [{ single_wrod: true }, 'specialTokens[0].single_wrod is true; flags are special, normalized'],
      [{ special: 'no' }, 'specialTokens[0].special is "no"'],
    ] as const)
      expect(() => train({ specialTokens: [{ content: '<a>', ...(flags as object) }] })).toThrow(problem)
    // Neither could be loaded again.
    expect(() => train({ specialTokens: ['a'.repeat(1025)] })).toThrow('has 1025 characters; use at most 1024')
    expect(() => train({ vocabSize: 2 ** 22 + 1 })).toThrow('vocabSize is 4194305; pass at most 4194304')
    const [token] = train({ specialTokens: [{ content: '<a>', special: false }] }).addedTokens
    expect(train({ specialTokens: ['<b>', token] }).addedTokens[1]).toEqual({ ...token, id: 1 })
  })

  test('rejects a corpus without text', () => {
    expect(() => trainBpe([], { vocabSize: 300 })).toThrow('the corpus is empty: 0 texts')
    expect(() => trainBpe(['', ''], { vocabSize: 300 })).toThrow('the corpus is empty: 2 texts')
    const bytes = Uint8Array.from({ length: 4000 }, (_, i) => (i * 2654435761) >>> 24)
    const binary = new TextDecoder().decode(bytes)
    expect(() => trainBpe([binary], { vocabSize: 300 })).toThrow('looks like binary data')
    expect(trainBpe([binary], { vocabSize: 300, allowBinary: true }).vocabSize).toBeGreaterThan(255)
    expect(() => trainBpe('one text' as never, { vocabSize: 300 })).toThrow('expected an iterable of strings')
    expect(() => trainBpe(undefined as never, { vocabSize: 300 })).toThrow(
      'expected an iterable of strings, got undefined',
    )
    expect(() => trainBpe(CORPUS, undefined as never)).toThrow(
      'expected an options object, got undefined; pass an object: { vocabSize,',
    )
    expect(() => trainBpe(CORPUS, {} as never)).toThrow('vocabSize undefined is smaller than 256 bytes')
    expect(() => trainBpe([1 as never], { vocabSize: 300 })).toThrow('text 0 is 1, not a string')
  })

  test('stops when the signal aborts', async () => {
    const controller = new AbortController()
    const options = { vocabSize: 320, signal: controller.signal, onProgress: () => controller.abort() }
    expect(() => trainBpe(CORPUS, options)).toThrow('training was aborted')
    await expect(trainBpeAsync(CORPUS, { vocabSize: 320, signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'E_ABORTED',
    })
  })

  test('has the same result asynchronously', async () => {
    async function* texts() {
      yield* CORPUS
    }
    expect((await trainBpeAsync(texts(), { vocabSize: 320, minFrequency: 1 })).toJSON()).toEqual(train().toJSON())
  })

  test('yields to the event loop within a text', async () => {
    const text = Array.from({ length: 400_000 }, (_, i) => `w${(i * 7919) % 1009}`).join(' ')
    let phase = ''
    let turns = 0
    const timer = setInterval(() => {
      if (phase !== 'merging') turns++
    }, 1)
    await trainBpeAsync([text], { vocabSize: 300, onProgress: progress => (phase = progress.phase) })
    clearInterval(timer)
    expect(turns).toBeGreaterThan(1)
  })

  test('respects the minimum frequency and the maximum token length', () => {
    expect(train({ vocabSize: 2000, minFrequency: 1000 }).mergeCount).toBe(0)
    const short = train({ vocabSize: 500, maxTokenLength: 3 })
    for (let id = 0; id < short.vocabSize; id++) expect(short.tokenBytes(id).length).toBeLessThan(3)
  })

  test('limits the alphabet to the bytes in the corpus on request', () => {
    expect(trainBpe(['abab'], { vocabSize: 10, initialAlphabet: 'seen' }).tokenToId('c')).toBeUndefined()
    expect(trainBpe(['abab'], { vocabSize: 10, initialAlphabet: { characters: 'c' } }).tokenToId('c')).toBe(2)
  })
})

test('a stream of many small parts that cannot be split takes linear time', async () => {
  const tokenizer = train()
  const text = 'a'.repeat(100_000)
  const found: number[] = []
  // Searching the whole buffer for every part would take a minute.
  for await (const some of tokenizer.encodeStream(text)) found.push(...some)
  expect(found).toEqual([...tokenizer.encode(text)])
})

test('values other than strings are rejected', () => {
  const tokenizer = train()
  for (const wrong of [undefined, null, 5, [1], {}, Symbol('a'), Object.create(null)] as unknown as string[]) {
    for (const encode of [() => tokenizer.encode(wrong), () => tokenizer.encodeWithOffsets(wrong)]) {
      expect(encode).toThrow(
        expect.objectContaining({ code: 'E_DATA', message: expect.stringContaining('expected a string') }),
      )
    }
  }
})

test('streams reject anything but texts and ids', async () => {
  const tokenizer = train()
  const read = async (parts: unknown) => {
    const found: number[] = []
    for await (const some of tokenizer.encodeStream(parts as string[])) found.push(...some)
    return found
  }
  for (const wrong of [undefined, null, 5, {}, ['a', undefined], [new TextEncoder().encode('ä')]]) {
    await expect(read(wrong)).rejects.toMatchObject({ code: 'E_DATA', op: 'encodeStream' })
  }
  await expect(read([Uint8Array.of(97)])).rejects.toThrow(
    "expected text, got object; read files with { encoding: 'utf8' }, and other bytes through a TextDecoderStream",
  )
  expect(await read(['ab', 'ab'].values())).toEqual([...tokenizer.encode('abab')])
  const stream = tokenizer.createDecodeStream()
  for (const wrong of [undefined, null, 'a', Promise.resolve([1])] as unknown as number[]) {
    expect(() => stream.push(wrong)).toThrow(/^decode: expected a list of ids, got .*; pass an array/)
  }
  expect(() => stream.push([undefined] as unknown as number[])).toThrow('unknown id undefined')
  expect(stream.push(new Set(tokenizer.encode('a')))).toBe('a')
})

describe('invalid calls', () => {
  const tokenizer = trainBpe(CORPUS, { vocabSize: 300 })
  const call = (method: 'encode' | 'decode' | 'encodeWithOffsets' | 'createDecodeStream', ...given: unknown[]) =>
    expect(() => (tokenizer[method] as (...given: unknown[]) => unknown)(...given))

  test('unknown options and options that are not an object are rejected', async () => {
    expect(() => trainBpe(CORPUS, { vocabSize: 300, minfrequency: 3 } as never)).toThrow(
      expect.objectContaining({
        code: 'E_CONFIG',
        message: expect.stringMatching(/unknown option minfrequency; known options are/),
      }),
    )
    await expect(trainBpeAsync(CORPUS, null as never)).rejects.toThrow('trainBpe: expected an options object, got null')
    call('encode', 'a', { addSpecialTokns: false }).toThrow('encode: unknown option addSpecialTokns')
    call('encode', 'a', null).toThrow('expected an options object, got null')
    call('encode', 'a', 'b').toThrow('expected an options object, got "b"')
    call('encodeWithOffsets', 'a', { special: false }).toThrow('unknown option special')
    call('decode', [1], { skipSpecial: true }).toThrow(
      'decode: unknown option skipSpecial; known options are skipSpecialTokens',
    )
    call('createDecodeStream', { skip: true }).toThrow('unknown option skip')
    call('encode', 'a', { special: undefined }).not.toThrow()
    const batch = (...given: unknown[]) =>
      (tokenizer.encodeBatch as (...given: unknown[]) => Promise<unknown>)(...given)
    await expect(batch(['a'], { thread: 2 })).rejects.toThrow('unknown option thread;')
    await expect(batch(['a'], { threads: 2.5 })).rejects.toThrow('threads is 2.5; pass a whole number from 0')
    for (const texts of [undefined, 'text', [1], Promise.resolve(['a'])]) {
      await expect(batch(texts)).rejects.toMatchObject({
        code: 'E_DATA',
        message: expect.stringMatching(/expected a list of texts, got/),
      })
    }
    expect(() => BpeTokenizer.fromTiktoken('', { pretokenizer: 'gpt2' } as never)).toThrow(
      'unknown option pretokenizer',
    )
  })

  test.each([
    ['preTokenizer', 5, 'a name, a RegExp or'],
    ['preTokenizer', { patterns: 'a' }, 'a name, a RegExp or'],
    ['normalizer', 'nfc', 'NFC, NFD'],
    ['specialTokens', '<s>', 'a list of texts'],
    ['specialTokens', [null], 'a list of texts'],
    ['minFrequency', '2', 'a number from 0'],
    ['initialAlphabet', 'all', "'bytes', 'seen' or"],
    ['maxTokenLength', Number.NaN, 'a number from 1'],
    ['onProgress', true, 'a function'],
    ['signal', new AbortController(), 'an AbortSignal'],
  ])('the option %s cannot be %s', (name, value, wanted) => {
    const call = () => trainBpe(CORPUS, { vocabSize: 300, [name]: value })
    expect(call).toThrow(expect.objectContaining({ code: 'E_CONFIG', message: expect.stringContaining(wanted) }))
  })

  test('ranks, texts and options of the wrong type are rejected', async () => {
    for (const ranks of [null, 5, {}, new Map([[-1, Uint8Array.of(1)]]), new Map([[1, 'a']])] as never[])
      expect(() => BpeTokenizer.fromTiktoken(ranks, { preTokenizer: 'gpt2' })).toThrow(
        /expected ranks, got .*; pass the text or the bytes/,
      )
    const ranks = 'YQ== 0'
    for (const options of [{}, { preTokenizer: 5 }, { preTokenizer: {} }] as never[]) {
      expect(() => BpeTokenizer.fromTiktoken(ranks, options)).toThrow('pass a name, a RegExp or { pattern')
      await expect(BpeTokenizer.fromTiktokenAsync(ranks, options)).rejects.toMatchObject({ code: 'E_CONFIG' })
    }
    await expect(BpeTokenizer.fromTiktokenAsync(ranks, undefined as never)).rejects.toThrow(
      'expected an options object, got undefined',
    )
    async function* texts() {
      yield* CORPUS
    }
    expect(() => trainBpe(texts() as never, { vocabSize: 300 })).toThrow(
      /use trainBpeAsync for texts that arrive asynchronously/,
    )
    expect((await trainBpeAsync(texts(), { vocabSize: 270 })).vocabSize).toBe(270)
  })

  test('ids and paths of the wrong type are rejected', async () => {
    for (const ids of [undefined, null, 5, 'a', Promise.resolve([1])])
      call('decode', ids).toThrow(/expected a list of ids, got .*; pass an array/)
    for (const ids of [[70], Int32Array.of(70), new Set([70]), { length: 1, 0: 70 }]) {
      expect(tokenizer.decode(ids as Iterable<number>)).toBe(tokenizer.decode([70]))
    }
    await expect(tokenizer.save(undefined as never)).rejects.toMatchObject({ code: 'E_FORMAT', op: 'save' })
  })
})
