/**
 * The ops of a training step other than matrix products, compared with PyTorch.
 *
 *     pnpm bench ops [--tokens 2048] [--rounds N] [--seconds N] [--json FILE] [--no-peers]
 *
 * Shows their time, and the share of the machine's bandwidth or arithmetic; PyTorch requires `.venv-reference`. Shapes
 * are those of the configuration `12m`. Bytes are those of inputs and outputs, counted once each, relative to the
 * bandwidth of copying 128 MiB. For attention and the loss, arithmetic is counted instead, relative to an f32 matrix
 * product of size 1024. Each round runs one process of ours, then one of PyTorch's, which computes the same in eager
 * mode; its backward time is that of forward and backward minus that of forward. Results are medians over the rounds.
 */
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { dtypeBytes, type OpAttrs, type OpName, type Shape, sizeOf, type TensorSpec, type Value } from '@moe/core'
import { createBackend } from '@moe/kernels-cpu'
import { findPython, lastJson, median, printTable, root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    tokens: { type: 'string', default: '2048' },
    rounds: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '0.2' },
    json: { type: 'string' },
    peers: { type: 'boolean', default: true },
    worker: { type: 'boolean', default: false },
  },
  allowNegative: true,
})

interface Measurement {
  readonly name: string
  readonly seconds: number
  /** Bytes that it moves, or operations that it computes. */
  readonly bytes?: number
  readonly flops?: number
}

interface Round {
  readonly results: readonly Measurement[]
  /** Bytes per second of a copy, and operations per second of a matrix product. */
  readonly bandwidth?: number
  readonly arithmetic?: number
}

// --- worker process: measures ---

async function work(): Promise<Round> {
  const backend = await createBackend()
  const tokens = Number(options.tokens)
  const table = { ...backend.primitives, ...backend.fused } as Record<string, unknown>
  const results: Measurement[] = []

  const upload = (data: Float32Array | Int32Array, shape: Shape): Value => ({
    handle: backend.upload(data, shape, data instanceof Int32Array ? 'i32' : 'f32'),
    shape,
    dtype: data instanceof Int32Array ? 'i32' : 'f32',
  })
  const random = (shape: Shape) =>
    upload(
      Float32Array.from({ length: sizeOf(shape) }, () => Math.random() - 0.5),
      shape,
    )
  const integers = (shape: Shape, below: number) =>
    upload(
      Int32Array.from({ length: sizeOf(shape) }, () => Math.floor(Math.random() * below)),
      shape,
    )
  const f32 = (shape: Shape): TensorSpec => ({ shape, dtype: 'f32' })
  const i32 = (shape: Shape): TensorSpec => ({ shape, dtype: 'i32' })
  const bytesOf = (specs: readonly TensorSpec[]) =>
    specs.reduce((sum, { shape, dtype }) => sum + sizeOf(shape) * dtypeBytes[dtype], 0)

  const call = <O extends OpName>(
    op: O,
    inputs: readonly Value[],
    attrs: OpAttrs[O],
    outputs: readonly TensorSpec[],
  ) => {
    const kernel = table[op] as (i: readonly Value[], a: unknown, o: readonly TensorSpec[]) => unknown[]
    return kernel(inputs, attrs, outputs)
  }
  const time = (once: () => readonly unknown[]) => {
    const free = () => {
      for (const handle of once()) backend.free(handle)
    }
    free()
    const seconds: number[] = []
    const end = performance.now() + 1000 * Number(options.seconds)
    while (seconds.length < 5 || performance.now() < end) {
      const started = performance.now()
      free()
      seconds.push((performance.now() - started) / 1000)
    }
    return median(seconds)
  }
  /** Times an op and returns its outputs. */
  function measure<O extends OpName>(
    name: string,
    op: O,
    inputs: readonly Value[],
    attrs: OpAttrs[O],
    outputs: readonly TensorSpec[],
    flops?: number,
  ): Value[] {
    const seconds = time(() => call(op, inputs, attrs, outputs))
    results.push({ name, seconds, ...(flops === undefined ? { bytes: bytesOf([...inputs, ...outputs]) } : { flops }) })
    return call(op, inputs, attrs, outputs).map((handle, i) => ({ handle, ...outputs[i] }))
  }

  const [hidden, vocabulary, experts, chosen, inner, heads, queryDim, ropeDim, valueDim, time_] = [
    256, 4096, 16, 4, 128, 8, 48, 16, 32, 256,
  ]
  const batch = tokens / time_
  const slots = tokens * chosen

  {
    const [x, weight, dy] = [random([tokens, hidden]), random([hidden]), random([tokens, hidden])]
    const attrs = { eps: 1e-6 }
    const [, rstd] = measure('rmsNorm', 'rmsNorm', [x, weight], attrs, [f32(x.shape), f32([tokens])])
    measure('rmsNorm backward', 'rmsNormBackward', [x, weight, rstd, dy], attrs, [f32(x.shape), f32([hidden])])
  }
  {
    const [gate, up, dy] = [random([slots, inner]), random([slots, inner]), random([slots, inner])]
    measure('swiglu', 'swiglu', [gate, up], {}, [f32(gate.shape)])
    measure('swiglu backward', 'swigluBackward', [gate, up, dy], {}, [f32(gate.shape), f32(gate.shape)])
  }
  {
    const x = random([batch, time_, heads, queryDim])
    const tables = [random([time_, ropeDim / 2]), random([time_, ropeDim / 2])]
    measure('rope', 'rope', [x, ...tables], { interleaved: true, inverse: false }, [f32(x.shape)])
  }
  {
    const query: Shape = [batch, time_, heads, queryDim]
    const value: Shape = [batch, time_, heads, valueDim]
    const [q, k, v, dout] = [random(query), random(query), random(value), random(value)]
    const attrs = { causal: true, scale: queryDim ** -0.5, precision: 'f32' } as const
    // Scores and sums over half of the square; backward: the scores again and four more products.
    const half = batch * heads * time_ * time_
    const forward = half * (queryDim + valueDim)
    const [out, lse] = measure(
      'attention',
      'attention',
      [q, k, v],
      attrs,
      [f32(value), f32([batch, heads, time_])],
      forward,
    )
    const inputs = [q, k, v, out, lse, dout]
    const backward = half * (3 * queryDim + 2 * valueDim)
    measure('attention backward', 'attentionBackward', inputs, attrs, [f32(query), f32(query), f32(value)], backward)
  }
  {
    const [x, weight, targets] = [
      random([tokens, hidden]),
      random([vocabulary, hidden]),
      integers([tokens], vocabulary),
    ]
    const dloss = random([tokens])
    const attrs = { ignoreIndex: -100, precision: 'f32' } as const
    const product = 2 * tokens * hidden * vocabulary
    const specs = [f32([tokens]), f32([tokens])]
    const [, lse] = measure('loss of the head', 'linearCrossEntropy', [x, weight, targets], attrs, specs, product)
    const inputs = [x, weight, targets, lse, dloss]
    const gradients = [f32(x.shape), f32(weight.shape)]
    measure('loss of the head backward', 'linearCrossEntropyBackward', inputs, attrs, gradients, 3 * product)
  }
  {
    const [logits, bias] = [random([tokens, experts]), random([experts])]
    const attrs = {
      scoring: 'sigmoid',
      groups: 4,
      topGroups: 2,
      groupScore: 'top2',
      topK: chosen,
      normalize: true,
      scale: 2.5,
    } as const
    const specs = [f32([tokens, chosen]), i32([tokens, chosen]), f32([tokens, experts])]
    const [weights, indices] = measure('router top-k', 'routerTopk', [logits, bias], attrs, specs)
    const plan = [i32([slots]), i32([slots]), i32([experts + 1]), i32([experts])]
    const [order, positions] = measure('dispatch plan', 'dispatchPlan', [indices], { experts }, plan)
    const [x, y, dout] = [random([tokens, hidden]), random([slots, hidden]), random([tokens, hidden])]
    measure('permute', 'permuteTokens', [x, order, positions], { topK: chosen }, [f32(y.shape)])
    measure('permute backward', 'permuteTokensBackward', [y, positions], { topK: chosen }, [f32(x.shape)])
    measure('combine', 'combineTokens', [y, weights, order, positions], {}, [f32(x.shape)])
    const combined = [y, weights, order, positions, dout]
    measure('combine backward', 'combineTokensBackward', combined, {}, [f32(y.shape), f32(weights.shape)])
  }
  {
    const [index, source] = [integers([tokens], vocabulary), random([tokens, hidden])]
    const shape = [vocabulary, hidden]
    measure('embedding backward', 'scatterAddRows', [index, source], { rows: vocabulary }, [f32(shape)])
  }
  {
    const shape = [2048, 2048]
    const one = upload(Float32Array.of(1), [])
    const [param, grad, m, v] = [random(shape), random(shape), random(shape), random(shape)]
    const attrs = { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 1 }
    const specs = [f32(shape), f32(shape), f32(shape)]
    const seconds = time(() => call('adamwStep', [param, grad, m, v, one], attrs, specs))
    // Donated: four tensors are read, three of them written.
    results.push({ name: 'AdamW', seconds, bytes: 7 * bytesOf([f32(shape)]) })
    measure('global norm', 'globalNorm', [grad], { parts: false }, [f32([])])
  }
  const large = random([32 << 20])
  const copied = time(() => call('unary', [large], { code: 'neg' }, [f32(large.shape)]))
  const square = [random([1024, 1024]), random([1024, 1024])]
  const attrs = { transposeA: false, transposeB: true, precision: 'f32' } as const
  const multiplied = time(() => call('matmul', square, attrs, [f32([1024, 1024])]))
  console.error(backend.device)
  backend.dispose()
  return { results, bandwidth: (2 * 4 * (32 << 20)) / copied, arithmetic: (2 * 1024 ** 3) / multiplied }
}

// --- main process: starts workers and compares ---

function compare(): void {
  const self = fileURLToPath(import.meta.url)
  const common = ['--tokens', options.tokens, '--seconds', options.seconds]
  const python = findPython(options.peers)
  const ours: Round[] = []
  const theirs: Round[] = []
  for (let round = 0; round < Number(options.rounds); round++) {
    ours.push(lastJson('@moe', process.execPath, [self, '--worker', ...common]))
    if (python) theirs.push(lastJson('PyTorch', python, [`${root}bench/peers/ops_torch.py`, '--json', ...common]))
  }
  const secondsOf = (rounds: readonly Round[], name: string) => {
    const found = rounds.flatMap(({ results }) => results.filter(result => result.name === name))
    return found.length === 0 ? undefined : median(found.map(({ seconds }) => seconds))
  }
  const bandwidth = median(ours.map(round => round.bandwidth ?? 0))
  const arithmetic = median(ours.map(round => round.arithmetic ?? 0))
  const results = ours[0].results.map(({ name, bytes, flops }) => {
    const seconds = secondsOf(ours, name) as number
    const peer = secondsOf(theirs, name)
    const share = bytes === undefined ? (flops as number) / seconds / arithmetic : bytes / seconds / bandwidth
    return { name, seconds, bytes, flops, share, pytorchSeconds: peer, ratio: peer && peer / seconds }
  })
  console.log(`copy ${(bandwidth / 1e9).toFixed(1)} GB/s, f32 products ${(arithmetic / 1e9).toFixed(0)} GFLOP/s`)
  printTable(
    ['op', 'ms', 'GB/s', 'GFLOP/s', 'of peak', 'PyTorch ms', 'ratio'],
    results.map(({ name, seconds, bytes, flops, share, pytorchSeconds, ratio }) => [
      name,
      (1000 * seconds).toFixed(3),
      bytes === undefined ? '' : (bytes / seconds / 1e9).toFixed(1),
      flops === undefined ? '' : (flops / seconds / 1e9).toFixed(0),
      `${(100 * share).toFixed(0)}%`,
      pytorchSeconds === undefined ? '' : (1000 * pytorchSeconds).toFixed(3),
      ratio === undefined ? '' : `${ratio.toFixed(2)}x`,
    ]),
  )
  writeResults(options.json, { tokens: Number(options.tokens), bandwidth, arithmetic, results })
}

if (options.worker) process.stdout.write(`${JSON.stringify(await work())}\n`)
else compare()
