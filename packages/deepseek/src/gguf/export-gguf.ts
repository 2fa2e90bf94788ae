/** @file Exports models as GGUF files for llama.cpp, Ollama and LM Studio. */
import { access, readFile } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import {
  adapterBase,
  type GgufEncoding,
  type GgufValue,
  openFolder,
  pathOf,
  readF32,
  toF32,
  type WriteGgufOptions,
  writeGguf,
} from '@moe/checkpoint'
import { checkOptions, Module, MoeError, type OptionNames, type StateEntry, shown, stateDict } from '@moe/core'
import { type DeepSeekConfig, parseConfig } from '../config.ts'
import { type FolderWeights, openWeights, parseJson, readConfig } from '../config-file.ts'
import type { DeepSeek } from '../model.ts'
import { checkSize, refuseAdapters } from '../pretrained.ts'
import { architectureOf } from './architecture.ts'
import { tensorsOf, type WeightSource } from './tensors.ts'
import { noVocabulary, type TokenizerFiles, type Vocabulary, vocabularyOf } from './vocabulary.ts'

/** Options of {@link exportGguf}. */
export interface ExportGgufOptions extends WriteGgufOptions {
  /**
   * Format of the matrices: 32, 16, 16, 8.5 or 4.5 bits per weight. Norms and gates are always f32. With `q8_0` and `q4_0`, matrices whose rows are not a multiple of 32 are f16.
   * Default `q8_0`.
   */
  readonly type?: GgufEncoding | undefined
  /**
   * A tokenizer (any object with `toJSON`, for example from `@moe/tokenizer-bpe`), the path of a tokenizer.json, or `'none'` for a file without a vocabulary. Default: tokenizer.json of the
   * folder.
   */
  readonly tokenizer?: string | { toJSON(): unknown } | undefined
  /** Jinja chat template. Default: chat_template.jinja or that of tokenizer_config.json in the folder. */
  readonly chatTemplate?: string | undefined
  /** llama.cpp's name of the pre-tokenizer (`tokenizer.ggml.pre`), if it is not recognized. */
  readonly preTokenizer?: string | undefined
  /** Display name of the model. Default: the folder's name. */
  readonly name?: string | undefined
}

const names: OptionNames<ExportGgufOptions> = {
  type: true,
  tokenizer: true,
  chatTemplate: true,
  preTokenizer: true,
  name: true,
  signal: true,
  onProgress: true,
}

/** The result of {@link exportGguf}. */
export interface ExportedGguf {
  /** Path of the file. */
  readonly path: string
  /** Size of the file in bytes. */
  readonly bytes: number
  /** Number of tensors in the file. */
  readonly tensors: number
  /** Differences between llama.cpp and this package for this model, as sentences. Empty if there are none. */
  readonly notes: readonly string[]
}

/** llama.cpp's `llama_ftype`: the format of most tensors. */
const fileTypes: Readonly<Record<GgufEncoding, number>> = { f32: 0, f16: 1, q4_0: 2, q8_0: 7, bf16: 32 }

/**
 * Exports a model as one GGUF file: V2 and V3 with the architecture `deepseek2` and latent attention, DeepSeek LLM as `llama`. From a folder, tensors are read one at a time and no backend is needed.
 * MTP modules are not exported.
 *
 * @param model a folder with config.json, safetensors and tokenizer.json, or a model in memory
 * @throws {MoeError} `E_CONFIG` for an unknown type or a configuration that llama.cpp cannot load, `E_UNSUPPORTED` for adapters and for a tokenizer that it does not support, `E_CHECKPOINT` for weights that do not fit or if the file
 *   system fails, `E_ABORTED` when cancelled. An existing file at `path` then stays unchanged.
 *
 * @example
 * ```ts
 * const { notes } = await exportGguf('runs/first/checkpoints/step-000600/model', 'first.gguf', { type: 'q8_0' })
 * ```
 */
export async function exportGguf(
  model: string | URL | DeepSeek,
  path: string | URL,
  options: ExportGgufOptions = {},
): Promise<ExportedGguf> {
  const file = pathOf('exportGguf', path)
  checkOptions('exportGguf', options, names)
  const { type = 'q8_0' } = options
  if (!Object.hasOwn(fileTypes, type)) {
    const fix = `pass one of ${Object.keys(fileTypes).join(', ')}`
    throw new MoeError({ code: 'E_CONFIG', op: 'exportGguf', problem: `unknown type ${shown(type)}`, fix })
  }
  if (model instanceof Module) {
    refuseAdapters('exportGguf', model)
    return write(
      model.config,
      memorySource(stateDict(model)),
      await vocabularyFrom(model.config, options),
      file,
      options,
    )
  }
  const folder = pathOf('exportGguf', model)
  if ((await adapterBase(folder)) !== undefined) {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: 'exportGguf',
      problem: `${folder} contains adapters, not a model`,
      fix: 'merge them into their base model and export that: const model = await DeepSeek.fromPretrained(folder); await mergeAdapters(model)',
    })
  }
  const opened = openFolder('exportGguf', folder)
  const config = parseConfig(await readConfig(opened))
  await using weights = await openWeights(opened)
  checkSize(folder, config, weights.checkpoint)
  const vocabulary = await vocabularyFrom(config, options, folder)
  return await write(config, folderSource(weights), vocabulary, file, {
    name: basename(resolve(folder)),
    ...options,
  })
}

async function write(
  config: DeepSeekConfig,
  source: WeightSource,
  vocabulary: Vocabulary,
  path: string,
  { type = 'q8_0', name, signal, onProgress }: ExportGgufOptions,
): Promise<ExportedGguf> {
  const architecture = architectureOf(config)
  const tensors = tensorsOf(config, source, type)
  const metadata: Record<string, GgufValue> = {
    'general.architecture': { type: 'string', value: architecture.name },
    'general.type': { type: 'string', value: 'model' },
    ...(name === undefined ? {} : { 'general.name': { type: 'string', value: name } }),
    'general.file_type': { type: 'u32', value: fileTypes[type] },
    'general.quantization_version': { type: 'u32', value: 2 },
    ...architecture.metadata,
    ...vocabulary.metadata,
  }
  const bytes = await writeGguf(path, { metadata, tensors }, { signal, onProgress })
  return { path, bytes, tensors: tensors.length, notes: [...architecture.notes, ...vocabulary.notes] }
}

function folderSource({ checkpoint, block }: FolderWeights): WeightSource {
  return {
    shape: key => (checkpoint.has(key) ? checkpoint.info(key).shape : undefined),
    read: async key => (await readF32(checkpoint, key, { block })).data,
  }
}

function memorySource(entries: readonly StateEntry[]): WeightSource {
  const byName = new Map(entries.map(entry => [entry.name, entry]))
  return {
    shape: key => byName.get(key)?.shape,
    async read(key) {
      const { dtype, data } = byName.get(key) as StateEntry
      return toF32(dtype, await data()) as Float32Array
    },
  }
}

async function vocabularyFrom(
  config: DeepSeekConfig,
  { tokenizer, chatTemplate, preTokenizer }: ExportGgufOptions,
  folder?: string,
): Promise<Vocabulary> {
  if (tokenizer === 'none') return noVocabulary
  const inFolder = async (name: string) => {
    const path = folder && join(folder, name)
    return path !== undefined && (await exists(path)) ? readFile(path, 'utf8') : undefined
  }
  const settings = await inFolder('tokenizer_config.json')
  const files: Omit<TokenizerFiles, 'tokenizer'> = {
    tokenizerConfig: settings === undefined ? undefined : json('tokenizer_config.json', settings),
    chatTemplate: chatTemplate ?? (await inFolder('chat_template.jinja')),
    preTokenizer,
  }
  if (typeof tokenizer === 'object') return vocabularyOf(config, { ...files, tokenizer: tokenizer.toJSON() })
  const text = tokenizer === undefined ? await inFolder('tokenizer.json') : await readText(tokenizer)
  if (text !== undefined) return vocabularyOf(config, { ...files, tokenizer: json('tokenizer.json', text) })
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op: 'exportGguf',
    problem: folder === undefined ? 'no tokenizer was given' : `${folder} has no tokenizer.json`,
    fix: "pass { tokenizer }: a tokenizer, the path of a tokenizer.json, or 'none' for a file without a vocabulary",
  })
}

async function readText(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8')
  } catch (cause) {
    const problem = `cannot be read: ${(cause as Error).message}`
    throw new MoeError({ code: 'E_CHECKPOINT', op: path, problem, fix: 'pass the path of a tokenizer.json', cause })
  }
}

const exists = (path: string): Promise<boolean> =>
  access(path).then(
    () => true,
    () => false,
  )

function json(name: string, text: string): unknown {
  try {
    return parseJson(text)
  } catch (cause) {
    const problem = `${name} is not valid JSON: ${(cause as Error).message}`
    throw new MoeError({ code: 'E_UNSUPPORTED', op: 'exportGguf', problem, cause })
  }
}
