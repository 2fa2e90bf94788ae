/** @file The command `moe-trainer tokenize`. */
import { statSync } from 'node:fs'
import { join } from 'node:path'
import { MoeError } from '@moe/core'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { onInterrupt, type ProgressStream } from '../host.ts'
import { UsageError } from '../usage-error.ts'
import { type TokenizeProgress, tokenize } from './tokenize.ts'

/** Arguments as `parseArgs` returns them. */
export interface TokenizeArguments {
  readonly tokenizer?: string | undefined
  readonly out?: string | undefined
  readonly field?: string | undefined
  readonly separator?: string | undefined
  readonly validation?: string | undefined
  readonly 'fim-rate'?: string | undefined
  readonly seed?: string | undefined
  readonly threads?: string | undefined
  readonly 'shard-tokens'?: string | undefined
  readonly overwrite: boolean
  readonly quiet: boolean
  readonly json: boolean
}

/** @throws UsageError; MoeError E_ABORTED after Ctrl-C */
export async function tokenizeCommand(patterns: readonly string[], values: TokenizeArguments): Promise<void> {
  const { tokenizer: path, out, field, separator, overwrite, quiet, json } = values
  if (patterns.length === 0) throw new UsageError('missing PATTERN')
  if (path === undefined) throw new UsageError('missing --tokenizer PATH')
  if (out === undefined) throw new UsageError('missing --out FOLDER')
  const number = (name: 'validation' | 'fim-rate' | 'seed' | 'threads' | 'shard-tokens') => {
    const text = values[name]
    if (text === undefined) return undefined
    if (text.trim() === '' || !Number.isFinite(Number(text)))
      throw new UsageError(`--${name} is "${text}", expected a number`)
    return Number(text)
  }
  const settings = {
    validation: number('validation'),
    fimRate: number('fim-rate'),
    seed: number('seed'),
    threads: number('threads'),
    shardTokens: number('shard-tokens'),
  }
  const tokenizer = await BpeTokenizer.fromFile(isFolder(path) ? join(path, 'tokenizer.json') : path)
  const abort = new AbortController()
  const stop = onInterrupt(() => abort.abort(interrupted(out)))
  const progress = quiet || json ? undefined : tokenizeProgress(process.stderr)
  try {
    const result = await tokenize(patterns, {
      ...settings,
      tokenizer,
      out,
      field,
      // Shells pass `\n` literally.
      separator: separator?.replaceAll('\\n', '\n').replaceAll('\\t', '\t'),
      overwrite,
      signal: abort.signal,
      onProgress: progress?.show,
    })
    progress?.clear()
    if (json) process.stdout.write(`${JSON.stringify(result)}\n`)
    else {
      const { trainingTokens, trainingDocuments, validationTokens, validationDocuments, seconds } = result
      const heldOut =
        validationTokens === 0 ? '' : `, ${grouped(validationTokens)} held out in ${grouped(validationDocuments)}`
      const tokens = `${grouped(trainingTokens)} tokens in ${grouped(trainingDocuments)} documents`
      process.stdout.write(`${out}: ${tokens}${heldOut}, ${seconds.toFixed(1)} s\n`)
    }
  } finally {
    progress?.clear()
    stop()
  }
}

const interrupted = (out: string) =>
  new MoeError({
    code: 'E_ABORTED',
    op: 'tokenize',
    problem: `interrupted; the progress is saved in ${out}`,
    fix: 'run the same command again to continue',
  })

const isFolder = (path: string) => statSync(path, { throwIfNoEntry: false })?.isDirectory() === true

/** Time between two updates on a terminal, and between two lines elsewhere. */
const redrawMs = 100
const patienceMs = 10_000

/** Shows progress on a line that is redrawn on a terminal, or on lines from time to time elsewhere. */
export function tokenizeProgress(stream: ProgressStream, now = () => performance.now()) {
  const terminal = stream.isTTY === true
  let drawnAt = Number.NEGATIVE_INFINITY
  let drawn = false
  const clear = () => {
    if (drawn) stream.write('\r\x1b[2K')
    drawn = false
  }
  const show = (progress: TokenizeProgress) => {
    if (now() - drawnAt < (terminal ? redrawMs : patienceMs)) return
    clear()
    stream.write(terminal ? lineOf(progress) : `${lineOf(progress)}\n`)
    drawn = terminal
    drawnAt = now()
  }
  return { show, clear }
}

function lineOf({ bytes, fromBytes, totalBytes, documents, tokens, seconds }: TokenizeProgress): string {
  const speed = (bytes - fromBytes) / seconds
  const left = Math.round((totalBytes - bytes) / speed)
  const eta = Number.isFinite(left) ? `${Math.floor(left / 60)}:${String(left % 60).padStart(2, '0')}` : '?'
  const share = totalBytes === 0 ? 100 : (100 * bytes) / totalBytes
  return `${share.toFixed(1)} %  ${grouped(tokens)} tokens  ${grouped(documents)} documents  ${(speed / 1e6).toFixed(1)} MB/s  ETA ${eta}`
}

const grouped = (value: number) => value.toLocaleString('en-US')
