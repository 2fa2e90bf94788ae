/**
 * @file Checkpoints with stacked experts, as those of Mistral Small 4: the experts of a layer are two tensors, `experts.gate_up_proj [E, 2 I, hidden]`,
 * where each expert has the rows of gate_proj, then those of up_proj, and `experts.down_proj [E, hidden, I]`. Scales of fp8 weights are stacked likewise:
 * `experts.gate_up_proj_scale_inv`.
 */
import type { StoredTensor, TensorEntry, TensorSource } from '@moe/checkpoint'
import { MoeError } from '@moe/core'

/** Part of a stacked tensor: elements from `part / parts` of its elements on. */
interface Slice {
  readonly of: string
  readonly part: number
  readonly parts: number
  readonly shape: readonly number[]
}

const stackedKey = /^(.*\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?$/

/**
 * Lists the experts of a checkpoint one by one, as V3 names them: `experts.{e}.gate_proj.weight` and so on. The last stacked tensor that was read stays
 * in memory, as the next expert is usually part of it.
 * @param block size of the blocks of fp8 weights, or null for one scale per matrix
 * @throws MoeError E_UNSUPPORTED if a block of scales would span gate_proj and up_proj
 */
export function splitExperts(source: TensorSource, block: readonly [number, number] | null): TensorSource {
  const slices = new Map<string, Slice | undefined>()
  for (const key of source.keys()) {
    const parts = slicesOf(source, key, block)
    if (parts === undefined) slices.set(key, undefined)
    else for (const [name, slice] of parts) slices.set(name, slice)
  }
  let last: { readonly key: string; readonly tensor: Promise<StoredTensor> } | undefined
  const stacked = (key: string) => {
    if (last?.key !== key) last = { key, tensor: source.read(key) }
    return last.tensor
  }
  const close = () => {
    last = undefined
    return source.close()
  }
  return {
    path: source.path,
    metadata: source.metadata,
    keys: () => [...slices.keys()],
    has: key => slices.has(key),
    info: key => {
      const slice = slices.get(key)
      if (slice === undefined) return source.info(key)
      const { bytes, ...whole } = source.info(slice.of)
      return { ...whole, shape: slice.shape, bytes: bytes / slice.parts }
    },
    read: async key => {
      const slice = slices.get(key)
      if (slice === undefined) return source.read(key)
      const { dtype, data } = await stacked(slice.of)
      const size = data.length / slice.parts
      return { dtype, shape: slice.shape, data: data.slice(slice.part * size, (slice.part + 1) * size) }
    },
    close,
    [Symbol.asyncDispose]: close,
  }
}

/** The matrices, or scales of matrices, of a stacked tensor; undefined for other tensors. */
function slicesOf(source: TensorSource, key: string, block: readonly [number, number] | null) {
  const match = stackedKey.exec(key)
  const { shape, file } = source.info(key)
  const [experts, rows, columns] = shape
  if (match === null || shape.length !== 3 || shape.some(size => size === 0)) return undefined
  const [, prefix, projection, scale = ''] = match
  const name = (expert: number, matrix: string) => `${prefix}.${expert}.${matrix}.weight${scale}`
  const each = Array.from({ length: experts }, (_, expert) => expert)
  const whole = (matrix: string) =>
    each.map(part => [name(part, matrix), { of: key, part, parts: experts, shape: [rows, columns] }] as const)
  if (projection === 'down_proj') return whole('down_proj')
  // One scale for gate_proj and up_proj together.
  if (scale !== '' && rows === 1) return [...whole('gate_proj'), ...whole('up_proj')]
  const inner = scale === '' ? rows / 2 : innerSize(source, key)
  if (rows % 2 === 1 || (scale !== '' && block !== null && inner % block[0] !== 0)) {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: file,
      problem: `tensor ${JSON.stringify(key)} of shape [${shape.join(', ')}] cannot be split into gate_proj and up_proj`,
      fix: 'use a checkpoint in bf16, or one whose moe_intermediate_size is a multiple of the block size',
    })
  }
  const half = (matrix: string, at: number) =>
    each.map(
      expert =>
        [
          name(expert, matrix),
          { of: key, part: 2 * expert + at, parts: 2 * experts, shape: [rows / 2, columns] },
        ] as const,
    )
  return [...half('gate_proj', 0), ...half('up_proj', 1)]
}

/** Rows of gate_proj, for the scales of `gate_up_proj`. */
function innerSize(source: TensorSource, scaleKey: string): number {
  const weight = scaleKey.slice(0, -'_scale_inv'.length)
  return source.has(weight) ? source.info(weight).shape[1] / 2 : 0
}

const expertKey = /^(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight$/

/** Replaces the entries of single experts, which are in the order of their numbers, by stacked ones. */
export function stackExperts(entries: readonly TensorEntry[]): TensorEntry[] {
  const others: TensorEntry[] = []
  const layers = new Map<string, Record<string, TensorEntry[]>>()
  for (const entry of entries) {
    const [, prefix, projection] = expertKey.exec(entry.name) ?? []
    if (prefix === undefined) {
      others.push(entry)
      continue
    }
    const layer = layers.get(prefix) ?? { gate_proj: [], up_proj: [], down_proj: [] }
    layers.set(prefix, layer)
    layer[projection].push(entry)
  }
  const stacks = [...layers].flatMap(([prefix, { gate_proj, up_proj, down_proj }]) => [
    stack(
      `${prefix}.gate_up_proj`,
      gate_proj.flatMap((gate, expert) => [gate, up_proj[expert]]),
      gate_proj.length,
    ),
    stack(`${prefix}.down_proj`, down_proj, down_proj.length),
  ])
  return [...others, ...stacks]
}

/** One tensor `[E, rows, columns]` of matrices, which may be several per expert. */
function stack(name: string, matrices: readonly TensorEntry[], experts: number): TensorEntry {
  const { dtype, shape } = matrices[0]
  const [rows, columns] = shape
  const data = async () => {
    const parts: Uint8Array[] = []
    for (const { data } of matrices) {
      const { buffer, byteOffset, byteLength } = typeof data === 'function' ? await data() : data
      parts.push(new Uint8Array(buffer, byteOffset, byteLength))
    }
    const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0))
    let at = 0
    for (const part of parts) {
      bytes.set(part, at)
      at += part.length
    }
    return bytes
  }
  return { name, dtype, shape: [experts, (rows * matrices.length) / experts, columns], data }
}
