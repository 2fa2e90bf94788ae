import { type MoeError, Parameter, type Tensor, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { expect, test } from 'vitest'
import { local } from '../index.ts'
import { hostMemory } from './host-memory.ts'
import { localOver } from './local.ts'
import { reduce } from './reduce.ts'
import { Assembly, partsInBuckets } from './row-shards.ts'
import { exercise, expected } from './test-exercise.ts'

const backend = referenceBackend()
const vector = (...values: number[]) => tensor(Float32Array.from(values), undefined, { backend })
const bytes = tensor(new Uint8Array(2), [2], { backend })

test.each([1, 2, 3, 4, 5, 8])(
  'all collectives between %i ranks give the expected results, with sums in the order of ranks, rounded once',
  async size => {
    const results = await local(size, exercise)
    for (const [rank, result] of results.entries()) expect(result).toEqual(expected(rank, size))
  },
)

test('reductions of more elements than a block', () => {
  const length = 2 * 4096 + 5
  const parts = [0, 1, 2].map(rank => Float32Array.from({ length }, (_, i) => ((i * 7 + rank * 5) % 13) - 6))
  const expected = {
    sum: (values: number[]) => values[0] + values[1] + values[2],
    mean: (values: number[]) => (values[0] + values[1] + values[2]) / 3,
    max: (values: number[]) => Math.max(...values),
  }
  for (const [reduction, of] of Object.entries(expected)) {
    const own = parts[1].slice()
    reduce(own, [parts[0], own, parts[2]], 'f32', reduction as keyof typeof expected)
    expect(own).toEqual(Float32Array.from(own, (_, i) => of(parts.map(part => part[i]))))
  }
})

test('a bucket has at most the given number of elements of each shard', () => {
  const rows = (count: number) => ({
    tensor: tensor(new Float32Array(2 * count), [count, 2], { backend }),
    from: 0,
    to: count,
  })
  const part = (index: number, from: number, to: number) => ({ index, from, to })
  expect([...partsInBuckets([[rows(2), rows(1)], [rows(3)], []], 3)]).toEqual([
    [[part(0, 0, 3)], [part(0, 0, 3)], []],
    [[part(0, 3, 4), part(1, 0, 2)], [part(0, 3, 6)], []],
  ])
})

test('a target is finished once all its elements have arrived', () => {
  const finished: number[][] = []
  const finish = (_: unknown, elements: ArrayLike<number>) => finished.push(Array.from(elements))
  const assembly = new Assembly(hostMemory, 'f32')
  const space = hostMemory.open()
  const [first, second] = [3, 2].map(length => ({ length, finish }))
  for (const [target, at, ...elements] of [
    [first, 1, 5, 6],
    [second, 1, 8],
    [first, 0, 4],
    [second, 0, 7],
  ] as const)
    assembly.put(space, target, at, Float32Array.from(elements), elements.length)
  expect(finished).toEqual([
    [4, 5, 6],
    [7, 8],
  ])
})

test('large tensors are sent in several parts, with the same results', async () => {
  const length = (1 << 22) + 3
  const sums = await local(2, async ranks => {
    const [large, small] = [length, 5].map(n => tensor(new Float32Array(n).fill(ranks.rank + 1), [n], { backend }))
    return Promise.all((await ranks.allReduce([small, large, small])).map(sum => sum.values()))
  })
  for (const [first, large, last] of sums) {
    expect([...first, ...last]).toEqual(new Array(10).fill(3))
    expect(large.length).toBe(length)
    expect(large.every(value => value === 3)).toBe(true)
  }
})

test('large shards are sent in several parts, and every tensor is complete at the end', async () => {
  const [rows, width] = [5, 2 ** 20 + 3]
  const handles = backend.stats().handles
  const results = await local(2, async ranks => {
    const from = (scale: number) =>
      tensor(
        Float32Array.from({ length: rows * width }, (_, i) => scale * (i % 1013)),
        [rows, width],
        { backend },
      )
    const small = tensor(new Float32Array(7).fill(ranks.rank + 1), [7], { backend })
    const large = from(ranks.rank + 1)
    const cut = (of: Tensor) => [
      [{ tensor: of, from: 0, to: 4 }],
      [
        { tensor: of, from: 4, to: 5 },
        { tensor: small, from: 0, to: 7 },
      ],
    ]
    const sums = await ranks.reduceScatterRows(cut(large))
    const parameter = new Parameter(from(0))
    const whole = new Parameter(small)
    await ranks.allGatherRows(
      [cut(parameter)[0], [cut(parameter)[1][0], { tensor: whole, from: 0, to: 7 }]],
      ranks.rank === 0 ? sums : [sums[0], whole],
    )
    const [numbers, others] = await Promise.all([parameter.values(), whole.values()])
    for (const each of [...sums, large, parameter, whole]) each.dispose()
    const isSum = numbers.every((x, i) => x === 3 * (i % 1013))
    return { isSum, others: [...others], shapes: sums.map(({ shape }) => shape) }
  })
  const others = new Array(7).fill(2)
  expect(results).toEqual([
    { isSum: true, others, shapes: [[4, width]] },
    { isSum: true, others, shapes: [[1, width], [7]] },
  ])
  expect(backend.stats().handles).toBe(handles)
})

test('invalid shards are rejected before any message is sent', async () => {
  await local(2, async ranks => {
    const [three, integers] = [vector(1, 2, 3), tensor(new Int32Array(2), [2], { backend })]
    const rows = (from: number, to: number, tensor: Tensor = three) => ({ tensor, from, to })
    const two = ranks.rank === 0 ? [vector(1, 2)] : [vector(3)]
    const faults: Array<Promise<unknown>> = [
      ranks.reduceScatterRows([[rows(0, 3)]]),
      ranks.reduceScatterRows([[rows(0, 2)], [rows(2, 4)]]),
      ranks.reduceScatterRows([[rows(1, 1)], []]),
      ranks.reduceScatterRows([[rows(0, 3)], [rows(0, 2, integers)]]),
      ranks.reduceScatterRows([[rows(0, 2)], [rows(2, 3)]], []),
      ranks.reduceScatterRows([[rows(0, 2)], [rows(2, 3)]], two),
      ranks.allGatherRows([[rows(0, 2)], [rows(2, 3)]], two),
      ranks.allGatherRows([[rows(0, 2)], [rows(1, 2)]], two),
      ranks.allGatherRows([[rows(0, 2)], []], ranks.rank === 0 ? two : []),
      ranks.allGatherRows([[rows(0, 2)], [rows(1, 3)]], [vector(1, 2)]),
      ranks.allGatherRows([[rows(0, 2)], [rows(2, 3)]], []),
      ranks.reduceScatterRows([[rows(0, 2, bytes)], []]),
    ]
    const messages = await Promise.all(faults.map(fault => fault.catch((e: MoeError) => `${e.code} ${e.message}`)))
    expect(messages).toEqual([
      expect.stringMatching(/^E_SHAPE reduceScatterRows: got 1 shards for 2 ranks/),
      expect.stringMatching(
        /^E_SHAPE reduceScatterRows: row range 2 to 4 is invalid for \[3\]; pass a non-empty range within 0 to 3/,
      ),
      expect.stringMatching(/^E_SHAPE reduceScatterRows: row range 1 to 1 is invalid for \[3\]/),
      expect.stringMatching(/^E_DTYPE reduceScatterRows: the shards mix f32 and i32 tensors/),
      expect.stringMatching(/^E_SHAPE reduceScatterRows: expected \[\d\] for this rank's shard, got nothing/),
      expect.stringMatching(/^E_BACKEND /),
      expect.stringMatching(/^E_BACKEND /),
      expect.stringMatching(/^E_SHAPE allGatherRows: the shards do not cover each row of \[3\] once; assign each row/),
      expect.stringMatching(/^E_SHAPE allGatherRows: the shards do not cover each row of \[3\] once/),
      expect.stringMatching(/^E_SHAPE allGatherRows: the shards do not cover each row of \[3\] once/),
      expect.stringMatching(/^E_SHAPE allGatherRows: expected \[\d\] for this rank's shard, got nothing/),
      expect.stringMatching(/^E_DTYPE reduceScatterRows: unsupported reduction: sum of u8/),
    ])
    // Ranks may have rows in any order.
    const whole = new Parameter(vector(0, 0, 0))
    await ranks.allGatherRows([[rows(2, 3, whole)], [rows(0, 2, whole)]], [ranks.rank === 0 ? vector(3) : vector(1, 2)])
    expect([...(await whole.values())]).toEqual([1, 2, 3])
  })
})

test('overlapping calls are matched by their order', async () => {
  const results = await local(3, async ranks => {
    const sums = [1, 10, 100].map(scale => ranks.allReduce([vector(scale * (ranks.rank + 1))]))
    const gathered = ranks.allGather(vector(ranks.rank))
    return Promise.all([...sums.map(async sum => (await sum)[0].item()), gathered.then(all => all.values())])
  })
  for (const result of results) expect(result).toEqual([6, 60, 600, Float32Array.of(0, 1, 2)])
})

test('two groups of the same ranks are independent: a call that waits in one does not block or change the other', async () => {
  // Long enough for buffers that are reused.
  const length = 1 << 15
  const sums = await local(2, async ranks => {
    const [first, second] = [ranks.group([0, 1]), ranks.group([0, 1])]
    const sum = async (of: typeof ranks, value: number) => {
      const [all] = await of.allReduce([tensor(new Float32Array(length).fill(value), [length], { backend })])
      return new Set(await all.values())
    }
    const steps = [() => sum(first, ranks.rank + 1), () => sum(second, 10 * ranks.rank + 10)]
    // Rank 0 completes the first call before it starts the second, which rank 1 starts first.
    if (ranks.rank === 0) return [await steps[0](), await steps[1]()]
    const begun = [steps[1](), steps[0]()]
    return (await Promise.all(begun)).reverse()
  })
  const [three, thirty] = [new Set([3]), new Set([30])]
  expect(sums).toEqual([
    [three, thirty],
    [three, thirty],
  ])
})

test('messages of send, of collective calls and of groups are kept apart', async () => {
  const received = await local(2, async ranks => {
    const all = [ranks, ranks.group([0, 1]), ranks.group([0, 1])]
    const word = { shape: [1], dtype: 'f32', backend } as const
    const calls = all.map((each, i) => ({
      send: () => [1, 2].map(n => each.send(vector(10 * i + n), 1)),
      receive: () => [each.receive(word, 0), each.receive(word, 0)],
      gather: () => each.allGather(vector(100 * i + ranks.rank)),
    }))
    // The ranks make their calls in opposite orders. Rank 0 sends before the other receives.
    if (ranks.rank === 0) {
      await Promise.all(calls.flatMap(({ send, gather }) => [...send(), gather()]))
      return []
    }
    await new Promise(setImmediate)
    const found = calls.reverse().flatMap(({ receive, gather }) => [gather(), ...receive()])
    return Promise.all((await Promise.all(found)).map(async each => [...(await each.values())]))
  })
  expect(received[1]).toEqual([[200, 201], [21], [22], [100, 101], [11], [12], [0, 1], [1], [2]])
})

test('messages arrive in the order of sending, also if the first tensor is read later', async () => {
  const slow: typeof backend = {
    ...backend,
    async download(value) {
      if (value.shape[0] === 2) await new Promise(setImmediate)
      return backend.download(value)
    },
  }
  const received = await local(2, async ranks => {
    const first = tensor([1, 2], undefined, { backend: slow })
    if (ranks.rank === 0) return Promise.all([ranks.send(first, 1), ranks.send(vector(3), 1)])
    const like = (length: number) => ({ shape: [length], dtype: 'f32', backend }) as const
    const all = [await ranks.receive(like(2), 0), await ranks.receive(like(1), 0)]
    return Promise.all(all.map(async each => [...(await each.values())]))
  })
  expect(received[1]).toEqual([[1, 2], [3]])
})

test('a message that cannot be sent fails its call', async () => {
  const broken = localOver(
    2,
    transport => ({
      rank: transport.rank,
      size: transport.size,
      send: () => Promise.reject(new Error('the network is down')),
      receive: transport.receive.bind(transport),
      close: transport.close.bind(transport),
    }),
    async ranks => ranks.rank === 0 && (await ranks.send(vector(1), 1)),
  )
  await expect(broken).rejects.toThrow('the network is down')
})

test('invalid arguments are rejected before any message is sent', async () => {
  await local(2, async ranks => {
    const faults: unknown[] = [
      ranks.allReduce([tensor(new Int32Array(2), [2], { backend })], 'mean'),
      ranks.allReduce([bytes]),
      ranks.allReduceInPlace([vector(1)]),
      ranks.allReduceInPlace([bytes]),
      ranks.reduceScatter(vector(1, 2, 3)),
      ranks.reduceScatter(bytes),
      ranks.reduceScatter(tensor([1], [], { backend })),
      ranks.allToAll(tensor([1], [], { backend }), [1, 0]),
      ranks.allToAll(vector(1, 2, 3), [1, 1]),
      ranks.allToAll(vector(1, 2, 3), [4, -1]),
      ranks.allToAll(vector(1, 2, 3), ranks.rank === 0 ? [1, 2] : [2, 1], [3, 3]),
      ranks.broadcast([vector(1)], 2),
      ranks.send(vector(1), ranks.rank),
      ranks.receive(vector(1), -1),
      ...[[1 - ranks.rank], [0, 1, 1], [0, 1, 2]].map(async members => ranks.group(members)),
      (async () => ranks.group([0, 1]).group([ranks.rank]))(),
    ]
    const messages = await Promise.all(
      faults.map(fault => (fault as Promise<unknown>).catch((e: MoeError) => `${e.code} ${e.message}`)),
    )
    expect(messages).toEqual([
      expect.stringMatching(/^E_DTYPE allReduce: unsupported reduction: mean of i32/),
      expect.stringMatching(/^E_DTYPE allReduce: unsupported reduction: sum of u8/),
      expect.stringMatching(/^E_BACKEND allReduceInPlace: reference cannot overwrite a tensor in place/),
      expect.stringMatching(/^E_DTYPE allReduceInPlace: unsupported reduction: sum of u8/),
      expect.stringMatching(
        /^E_SHAPE reduceScatter: the first axis of \[3\] is not divisible by the number of ranks, 2/,
      ),
      expect.stringMatching(/^E_DTYPE reduceScatter: unsupported reduction: sum of u8/),
      expect.stringMatching(/^E_SHAPE reduceScatter: the first axis of \[\] is not divisible/),
      expect.stringMatching(/^E_SHAPE allToAll: counts \[1,0\] do not divide the rows of \[\] among 2 ranks/),
      expect.stringMatching(/^E_SHAPE allToAll: counts \[1,1\] do not divide the rows of \[3\] among 2 ranks/),
      expect.stringMatching(/^E_SHAPE allToAll: counts \[4,-1\]/),
      expect.stringMatching(/^E_SHAPE allToAll: rank \d of 2 cannot receive \[3,3\] rows while it sends/),
      expect.stringMatching(/^E_CONFIG broadcast: there is no rank 2 \(size 2\); pass a rank from 0 to 1$/),
      expect.stringMatching(/^E_CONFIG send: rank \d is this rank itself/),
      expect.stringMatching(
        /^E_CONFIG receive: there is no rank -1 \(size 2\); pass a rank from 0 to 1, other than this one$/,
      ),
      expect.stringMatching(/^E_CONFIG group: \[\d\] is not a valid group for rank \d; list this rank/),
      expect.stringMatching(/^E_CONFIG group: \[0,1,1\] is not a valid group for rank \d/),
      expect.stringMatching(/^E_CONFIG group: there is no rank 2 \(size 2\)/),
      expect.stringMatching(/^E_CONFIG group: this communicator is already a group/),
    ])
    expect(await (await ranks.allReduce([vector(1)]))[0].item()).toBe(2)
    expect(await (await ranks.broadcast([vector(ranks.rank)]))[0].item()).toBe(0)
  })
  await expect(local(0, async () => {})).rejects.toThrow(/the number of ranks is 0, expected a positive integer/)
})

test('ranks that make different calls get an error', async () => {
  const shapes = local(2, async ranks => ranks.allGather(vector(...new Array(ranks.rank + 1).fill(1))))
  await expect(shapes).rejects.toThrow(/received 8 bytes from rank 1, expected 4/)
  const missing = local(2, async ranks => (ranks.rank === 0 ? ranks.barrier() : undefined))
  await expect(missing).rejects.toThrow(/waiting for a message that will not arrive: rank 1 has ended/)
})

test('a call that fails leaves no tensor behind', async () => {
  const handles = backend.stats().handles
  const run = local(2, async ranks => {
    // Two succeed (large tensors are sent on their own); the third has different lengths on the ranks.
    const [large, other] = [1 << 22, 3 + ranks.rank].map(n => tensor(new Float32Array(n), [n], { backend }))
    try {
      await ranks.allReduce([large, large, other])
    } finally {
      large.dispose()
      other.dispose()
    }
  })
  await expect(run).rejects.toThrow(/received \d+ bytes from rank/)
  expect(backend.stats().handles).toBe(handles)
})

test('a message that arrives after its call has failed does not change the results of later calls', async () => {
  const length = 1 << 15
  const filled = (value: number, extra = 0) =>
    tensor(new Float32Array(length + extra).fill(value), [length + extra], { backend })
  const results = await local(3, async ranks => {
    const [failing, sound] = [ranks.group([0, 1, 2]), ranks.group([0, 1, 2])]
    const fail = () => failing.allGather(filled(9, ranks.rank === 1 ? 1 : 0)).catch((e: MoeError) => e.code)
    const gather = async () => (await sound.allGather(filled(ranks.rank))).values()
    const word = { shape: [1], dtype: 'f32', backend } as const
    if (ranks.rank === 0) {
      expect(await fail()).toBe('E_SHAPE')
      const gathered = gather()
      await ranks.send(vector(1), 2)
      return gathered
    }
    if (ranks.rank === 1) {
      expect(await fail()).toBe('E_SHAPE')
      await ranks.receive(word, 2)
      return gather()
    }
    await ranks.receive(word, 0)
    const gathered = gather()
    // The message of the failed call arrives while rank 0 waits for that of rank 1.
    await new Promise(setImmediate)
    expect(await fail()).toBe('E_SHAPE')
    await ranks.send(vector(1), 1)
    return gathered
  })
  for (const all of results) expect([0, 1, 2].map(rank => all[rank * length])).toEqual([0, 1, 2])
})

test('a failed rank ends the calls that wait for it, and local() throws its error', async () => {
  const ended: string[] = []
  const run = local(3, async ranks => {
    if (ranks.rank === 1) throw new Error('the disk is full')
    await ranks.barrier().catch((error: MoeError) => {
      ended.push(`${ranks.rank}: ${error.code} ${error.message}`)
      throw error
    })
  })
  await expect(run).rejects.toThrow('the disk is full')
  expect(ended.length).toBe(2)
  expect(ended.every(line => /E_ABORTED .*rank \d has failed/.test(line))).toBe(true)
})

test('a rank that ends early does not end calls that wait for others', async () => {
  const received = await local(3, async ranks => {
    if (ranks.rank === 2) return
    if (ranks.rank === 1) {
      await new Promise(setImmediate)
      return ranks.send(vector(7), 0)
    }
    return (await ranks.receive({ shape: [1], dtype: 'f32', backend }, 1)).item()
  })
  expect(received[0]).toBe(7)
})
