/** @file Tests of the emulated cuBLASLt: products are correct, and calls that the real library forbids, or that would only work by luck, are rejected. */
import koffi from 'koffi'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { emulatedCublasLt } from './test-backend.ts'
import { openEmulator, unbuilt } from './test-emulator.ts'

const invalidValue = 7
const notSupported = 15
const f32 = 0
const compute32F = 68

describe.skipIf(unbuilt)('emulated cuBLASLt', () => {
  const device = openEmulator()
  const library = unbuilt ? (undefined as never) : koffi.load(emulatedCublasLt)
  const f = (prototype: string) => library.func(prototype) as unknown as (...args: unknown[]) => number
  const word = new BigUint64Array(1)
  const created = (status: number) => {
    expect(status).toBe(0)
    return Number(word[0])
  }
  const handle = () => created(f('int cublasLtCreate(void* handle)')(word))
  const description = (compute = compute32F) =>
    created(f('int cublasLtMatmulDescCreate(void* d, int compute, int scale)')(word, compute, f32))
  const layout = (rows: number, columns: number, ld = rows, type = f32) =>
    created(
      f('int cublasLtMatrixLayoutCreate(void* l, int type, uint64_t rows, uint64_t columns, int64_t ld)')(
        word,
        type,
        rows,
        columns,
        ld,
      ),
    )
  const set = (what: 'MatmulDesc' | 'MatrixLayout' | 'MatmulPreference') =>
    f(`int cublasLt${what}SetAttribute(uint64_t object, int attribute, const void* value, size_t bytes)`)
  const preference = (workspace = 0, alignment = 4) => {
    const one = created(f('int cublasLtMatmulPreferenceCreate(void* p)')(word))
    expect(set('MatmulPreference')(one, 1, BigUint64Array.of(BigInt(workspace)), 8)).toBe(0)
    for (const which of [5, 6, 7, 8]) expect(set('MatmulPreference')(one, which, Uint32Array.of(alignment), 4)).toBe(0)
    return one
  }
  const heuristic = f(
    'int cublasLtMatmulAlgoGetHeuristic(uint64_t h, uint64_t d, uint64_t a, uint64_t b, uint64_t c, uint64_t dd, uint64_t p, int most, void* results, void* count)',
  )
  const matmul = f(
    'int cublasLtMatmul(uint64_t h, uint64_t op, const void* alpha, uint64_t a, uint64_t la, uint64_t b, uint64_t lb, const void* beta, uint64_t c, uint64_t lc, uint64_t d, uint64_t ld, const void* algo, uint64_t workspace, size_t bytes, uint64_t stream)',
  )

  /** Prepares D = 2 A B + 3 C of column-major matrices, 2 x k times k x 2, with the given overrides. */
  function product(
    k: number,
    overrides: Partial<Record<'lda' | 'pointerB' | 'workspace' | 'alignment' | 'd', number>>,
  ) {
    const numbers = (n: number) => Float32Array.from({ length: n }, (_, i) => i + 1)
    const [la, lb, lc] = [layout(2, k, overrides.lda ?? 2), layout(k, 2), layout(2, 2)]
    const [h, op] = [handle(), description()]
    const results = new Uint8Array(96)
    const count = new Int32Array(1)
    const options = preference(2 ** 20, overrides.alignment)
    const heuristicStatus = heuristic(h, op, la, lb, lc, lc, options, 1, results, count)
    const needed = Number(new DataView(results.buffer).getBigUint64(64, true))
    const d = overrides.d ?? device.allocate(16)
    const workspace = needed > 0 ? device.allocate(needed) : 0
    const run = (algorithm = results, stream = 0) =>
      matmul(
        h,
        op,
        Float32Array.of(2),
        device.upload(numbers(2 * k)),
        la,
        device.upload(numbers(2 * k)) + (overrides.pointerB ?? 0),
        lb,
        Float32Array.of(3),
        device.upload(Float32Array.of(1, 10, 100, 1000)),
        lc,
        d,
        lc,
        algorithm,
        workspace,
        overrides.workspace ?? needed,
        stream,
      )
    return { heuristicStatus, count: count[0], run, d, results, needed }
  }
  const result = (d: number) => [...device.download(d, Float32Array, 4)]

  beforeEach(() => device.reset())
  afterEach(() => device.reset())

  test('computes 2 A B + 3 C', () => {
    const { run, d } = product(2, {})
    expect(run()).toBe(0)
    // A = [1 3; 2 4], B the same.
    expect(result(d)).toEqual([2 * 7 + 3, 2 * 10 + 30, 2 * 15 + 300, 2 * 22 + 3000])
    expect(device.report()).toBe('')
  })

  test('computes split-K products through the workspace', () => {
    const { run, d, needed } = product(400, {})
    expect(needed).toBe(2 * 2 * 2 * 4)
    expect(run()).toBe(0)
    let sum = 0
    for (let i = 0; i < 400; i++) sum += (2 * i + 1) * (i + 1)
    expect(result(d)[0]).toBeCloseTo(2 * sum + 3, -2)
  })

  test('runs products in stream order, and at each launch of a captured graph', () => {
    const stream = device.stream()
    const { run, d, results } = product(2, {})
    expect(device.call('cuMemsetD8Async', d, 0, 16, 0)).toBe(0)
    expect(device.synchronize()).toBe(0)
    expect(device.call('cuStreamBeginCapture_v2', stream, 2)).toBe(0)
    expect(run(results, stream)).toBe(0)
    const graph = new BigUint64Array(1)
    const at = Number(koffi.address(graph as never))
    expect(device.call('cuStreamEndCapture', stream, at)).toBe(0)
    expect(result(d)).toEqual([0, 0, 0, 0])
    const exec = new BigUint64Array(1)
    expect(device.call('cuGraphInstantiateWithFlags', Number(koffi.address(exec as never)), Number(graph[0]), 0)).toBe(
      0,
    )
    expect(device.call('cuGraphLaunch', Number(exec[0]), stream)).toBe(0)
    expect(device.call('cuStreamSynchronize', stream)).toBe(0)
    expect(result(d)[0]).toBe(17)
  })

  test('attributes of the wrong size and unknown attributes are rejected', () => {
    expect(set('MatmulDesc')(description(), 3, BigInt64Array.of(1n), 8)).toBe(invalidValue)
    expect(set('MatmulDesc')(description(), 99, Int32Array.of(1), 4)).toBe(invalidValue)
    expect(set('MatrixLayout')(layout(2, 2), 5, BigInt64Array.of(1n), 8)).toBe(invalidValue)
    expect(set('MatmulPreference')(preference(), 1, Uint32Array.of(1), 4)).toBe(invalidValue)
    expect(set('MatrixLayout')(0, 5, Int32Array.of(1), 4)).toBe(invalidValue)
  })

  test('products with invalid sizes, types or batches are rejected', () => {
    expect(product(2, { lda: 1 }).heuristicStatus).toBe(invalidValue)
    expect(device.report()).toMatch(/refused: cublasLt: A has an ld of 1 for 2 rows/)
    const heuristicOf = (op: number, la: number, lb: number, lc: number) =>
      heuristic(handle(), op, la, lb, lc, lc, preference(), 1, new Uint8Array(96), new Int32Array(1))
    expect(heuristicOf(description(), layout(2, 3), layout(4, 2), layout(2, 2))).toBe(invalidValue)
    expect(device.report()).toMatch(/sizes differ: 2 x 3 times 4 x 2 gives 2 x 2/)
    expect(heuristicOf(description(77), layout(2, 3), layout(3, 2), layout(2, 2))).toBe(notSupported)
    expect(heuristicOf(description(), layout(2, 3, 2, 14), layout(3, 2), layout(2, 2))).toBe(notSupported)
    expect(heuristicOf(description(), layout(2, 0), layout(0, 2), layout(2, 2))).toBe(invalidValue)
    expect(heuristicOf(description(), 0, layout(3, 2), layout(2, 2))).toBe(invalidValue)
    const batched = layout(2, 3)
    expect(set('MatrixLayout')(batched, 5, Int32Array.of(2), 4)).toBe(0)
    expect(heuristicOf(description(), batched, layout(3, 2), layout(2, 2))).toBe(invalidValue)
  })

  test('pointers, workspace and algorithm must match the call of the heuristic', () => {
    expect(product(2, { pointerB: 4, alignment: 16 }).run()).toBe(invalidValue)
    expect(device.report()).toMatch(/B at 0x.*but the heuristic was called with multiples of 16/)
    expect(product(400, { workspace: 8 }).run()).toBe(invalidValue)
    expect(device.report()).toMatch(/a workspace of 8 bytes at .*needs 32/)
    const other = product(3, {}).results
    expect(product(2, {}).run(other)).toBe(invalidValue)
    expect(device.report()).toMatch(/the algorithm was found for another product/)
  })

  test.each([
    ['that ends too early', 8, /cublasLtMatmul: out of bounds: writes 8 bytes/],
    ['that was freed', 0, /cublasLtMatmul: out of bounds: writes 8 bytes .* which were freed/],
  ])('an output buffer %s causes a device fault', (_, bytes, message) => {
    const d = device.allocate(Math.max(bytes, 16))
    const small = bytes === 0 ? d : device.allocate(bytes)
    if (bytes === 0) device.free(d)
    expect(product(2, { d: small }).run()).toBe(0)
    expect(device.synchronize()).toBe(700)
    expect(device.report()).toMatch(message)
  })
})
