import { readFile } from 'node:fs/promises'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { beforeAll, describe, expect, it, onTestFinished } from 'vitest'
import { readGguf } from './gguf/read-gguf.ts'
import { writeGguf } from './gguf/write-gguf.ts'
import { type OpenOptions, openCheckpoint } from './open-checkpoint.ts'
import { readSafetensors } from './read-safetensors.ts'
import { fixture, rawFile, temporaryFolder } from './test-files.ts'

const MB = 2 ** 20

/** A local web server. */
interface Site {
  readonly address: string
  /** Path and byte range (or `all`) of each request, for example `/a 0-99`. */
  readonly requests: string[]
}

interface Behaviour {
  /** Is called before the site responds; returns whether it has responded itself. */
  answer?(request: IncomingMessage, response: ServerResponse, bytes: Uint8Array | undefined): boolean | undefined
  ranges?: boolean
}

/** Starts a server that serves `files` by path, with range requests unless `ranges` is false. */
async function site(
  files: Readonly<Record<string, Uint8Array>>,
  { answer, ranges = true }: Behaviour = {},
): Promise<Site> {
  const requests: string[] = []
  const server = createServer((request, response) => {
    const path = (request.url as string).replace(/\?.*/, '')
    const { range } = request.headers
    requests.push(`${request.url} ${range?.replace('bytes=', '') ?? 'all'}`)
    const bytes = files[path]
    if (answer?.(request, response, bytes)) return
    if (!bytes) return void response.writeHead(404).end('none')
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(range ?? '') ?? []
    if (!ranges || first === undefined)
      return void response.writeHead(200, { 'content-length': bytes.length }).end(bytes)
    if (Number(first) >= bytes.length) {
      return void response.writeHead(416, { 'content-range': `bytes */${bytes.length}` }).end()
    }
    const end = Math.min(Number(last) + 1, bytes.length)
    response.writeHead(206, { 'content-range': `bytes ${first}-${end - 1}/${bytes.length}` })
    response.end(bytes.subarray(Number(first), end))
  })
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
  onTestFinished(() => {
    server.close()
    server.closeAllConnections()
  })
  return { address: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, requests }
}

/** A file of u8 tensors of these sizes, named a, b, ..., whose bytes are all different from their neighbours'. */
function fileOf(...sizes: number[]): Uint8Array {
  let end = 0
  const header = Object.fromEntries(
    sizes.map((size, i) => {
      const begin = end
      end += size
      return [String.fromCharCode(97 + i), { dtype: 'U8', shape: [size], data_offsets: [begin, end] }]
    }),
  )
  const bytes = rawFile(header, end)
  for (let i = bytes.length - end; i < bytes.length; i++) bytes[i] = (i * 2654435761) >>> 13
  return bytes
}

const large = fileOf(3 * MB, 6 * MB, 10, 20 * MB, MB)
let sharded: Record<string, Uint8Array>
let dtypes: Uint8Array

beforeAll(async () => {
  const names = ['model.safetensors.index.json', ...[1, 2, 3].map(n => `model-0000${n}-of-00003.safetensors`)]
  sharded = Object.fromEntries(
    await Promise.all(names.map(async name => [`/m/${name}`, await readFile(join(fixture('sharded'), name))] as const)),
  )
  dtypes = await readFile(fixture('dtypes.safetensors'))
})

const failure = (opening: Promise<unknown>) =>
  opening.then(
    () => 'it opened',
    (error: Error) => error,
  )

describe('a checkpoint on the web', () => {
  it.each([true, false])('contains the same tensors as on disk, with range requests: %s', async ranges => {
    const { address } = await site({ ...sharded, '/d/model.safetensors': dtypes }, { ranges })
    for (const [folder, local] of [
      ['/m', 'sharded'],
      ['/m/', 'sharded'],
      ['/m/model.safetensors.index.json', 'sharded'],
      ['/d/model.safetensors', 'dtypes.safetensors'],
      ['/d', 'dtypes.safetensors'],
    ]) {
      await using here = await openCheckpoint(fixture(local))
      await using there = await openCheckpoint(new URL(address + folder))
      expect(there.keys()).toEqual(here.keys())
      expect(there.metadata).toEqual(here.metadata)
      for (const key of here.keys()) expect(await there.read(key)).toEqual(await here.read(key))
    }
  })

  it('of one file opens with readSafetensors and readGguf, too', async () => {
    const path = join(await temporaryFolder(), 'a.gguf')
    const tensors = [{ name: 'x', type: 'f32', shape: [3], values: Float32Array.of(1, 2, 3) }] as const
    await writeGguf(path, { metadata: {}, tensors })
    const { address } = await site({ '/a': dtypes, '/a.gguf': await readFile(path) })
    await using file = await readSafetensors(`${address}/a`)
    expect((await file.read('scalar')).data).toEqual(Float32Array.of(7.5))
    expect(file.info('scalar').file).toBe(`${address}/a`)
    await using gguf = await readGguf(`${address}/a.gguf`)
    expect(await gguf.readF32('x')).toEqual(Float32Array.of(1, 2, 3))
    await expect(readSafetensors(`${address}/none`)).rejects.toThrow(`${address}/none: no such file`)
  })

  it('is read in aligned blocks, each requested once if tensors are read in order', async () => {
    const { address, requests } = await site({ '/model.safetensors': large })
    await using checkpoint = await openCheckpoint(address)
    const start = large.length - 30 * MB - 10
    const at = { a: 0, b: 3 * MB, c: 9 * MB, d: 9 * MB + 10, e: 29 * MB + 10 }
    for (const [key, begin] of Object.entries(at)) {
      const { data } = await checkpoint.read(key)
      const { bytes } = checkpoint.info(key)
      expect(Buffer.compare(data as Uint8Array, large.subarray(start + begin, start + begin + bytes))).toBe(0)
    }
    const block = (first: number, end: number) =>
      `/model.safetensors ${first * 4 * MB}-${Math.min(end * 4 * MB, large.length) - 1}`
    expect(requests).toEqual([`/model.safetensors 0-${4 * MB - 1}`, block(1, 3), block(3, 7), block(7, 8)])
    await Promise.all(['a', 'c', 'e'].map(key => checkpoint.read(key)))
    expect(requests).toHaveLength(4)
  })

  it('receives one request for concurrent reads of the same block', async () => {
    const { address, requests } = await site({ '/model.safetensors': fileOf(4 * MB, 10, 20, 30) })
    await using checkpoint = await openCheckpoint(address)
    await Promise.all(['b', 'c', 'd'].map(key => checkpoint.read(key)))
    expect(requests).toHaveLength(2)
  })

  it('caches at most 64 MiB, and requests evicted blocks again', async () => {
    const { address, requests } = await site({ '/model.safetensors': fileOf(10, 80 * MB, 10) })
    await using checkpoint = await openCheckpoint(address)
    const before = await checkpoint.read('a')
    await checkpoint.read('b')
    const requestsBefore = requests.length
    expect(await checkpoint.read('a')).toEqual(before)
    expect(requests).toHaveLength(requestsBefore + 1)
  })

  it('encodes file names as one path segment, and keeps the query of the folder', async () => {
    const name = 'a?b#c %2e%2e.safetensors'
    const index = { weight_map: Object.fromEntries([...'abcde'].map(key => [key, name])) }
    const { address, requests } = await site({
      '/m/model.safetensors.index.json': new TextEncoder().encode(JSON.stringify(index)),
      [`/m/${encodeURIComponent(name)}`]: large,
    })
    await using checkpoint = await openCheckpoint(`${address}/m?token=secret`)
    expect(checkpoint.info('a').file).toBe(`${address}/m/${encodeURIComponent(name)}`)
    expect(requests.every(request => /^\/m\/[^/]+\?token=secret /.test(request))).toBe(true)
    const error = await failure(openCheckpoint(`${address}/none?token=secret`))
    expect(error).toMatchObject({ code: 'E_CHECKPOINT', message: expect.not.stringContaining('secret') })
  })

  it.each(['../x', '..', '/etc/passwd', 'http://127.0.0.1/x', 'a\\b'])(
    'requests no shard outside its folder: %s',
    async name => {
      const index = new TextEncoder().encode(JSON.stringify({ weight_map: { a: name } }))
      const { address, requests } = await site({ '/m/model.safetensors.index.json': index })
      await expect(openCheckpoint(`${address}/m`)).rejects.toThrow(/shards must be plain file names/)
      expect(requests.map(request => request.split(' ')[0])).toEqual([
        '/m/model.safetensors',
        '/m/model.safetensors.index.json',
      ])
    },
  )

  it('reports progress up to the total, with and without ranges, and on disk', async () => {
    for (const ranges of [true, false, undefined]) {
      const { address } = await site({ '/model.safetensors': large }, { ranges })
      const steps: [number, number][] = []
      const onProgress: OpenOptions['onProgress'] = ({ bytes, totalBytes }) => steps.push([bytes, totalBytes])
      await using checkpoint = await openCheckpoint(ranges === undefined ? fixture('sharded') : address, { onProgress })
      for (const key of checkpoint.keys()) await checkpoint.read(key)
      expect(steps.every(([bytes], i) => i === 0 || bytes >= steps[i - 1][0])).toBe(true)
      expect(steps.length).toBeGreaterThan(4)
      const [bytes, totalBytes] = steps.at(-1) as [number, number]
      expect(bytes).toBe(totalBytes)
      if (ranges !== undefined) expect(totalBytes).toBe(large.length)
    }
  })

  it('is requested with a custom fetch', async () => {
    const { address } = await site(
      { '/model.safetensors': dtypes },
      { answer: ({ headers }, response) => headers.authorization !== 'Bearer 1' && !!response.writeHead(401).end() },
    )
    await expect(openCheckpoint(address)).rejects.toThrow(/responded with 401 Unauthorized; .*pass \{ fetch \}/)
    await using checkpoint = await openCheckpoint(address, {
      fetch: (to, init) => fetch(to, { ...init, headers: { ...init.headers, authorization: 'Bearer 1' } }),
    })
    expect(checkpoint.has('scalar')).toBe(true)
  })

  it('is downloaded as a whole if the page cannot see its length', async () => {
    const { address, requests } = await site({ '/model.safetensors': large })
    const hidden = async (to: string, init: RequestInit) => {
      const { status, body } = await fetch(to, init)
      return new Response(body, { status })
    }
    await using checkpoint = await openCheckpoint(address, { fetch: hidden as never })
    expect((await checkpoint.read('c')).data).toHaveLength(10)
    expect(requests.map(request => request.split(' ')[1])).toEqual([`0-${4 * MB - 1}`, 'all'])
  })
})

describe('reading reports a server that', () => {
  const model = { '/model.safetensors': large }
  const open = async (answer: Behaviour['answer'], options: OpenOptions = {}, ranges = true) => {
    const { address } = await site(model, { answer, ranges })
    return failure(openCheckpoint(address, options).then(checkpoint => checkpoint.read('d')))
  }
  /** Answers requests for bytes at `from` or later with `respond`, which gets the first requested byte. */
  const answerFrom = (
    from: number,
    respond: (response: ServerResponse, first: number) => void,
  ): Behaviour['answer'] => {
    return ({ headers }, response) => {
      const first = Number(/\d+/.exec(headers.range ?? '0')?.[0])
      if (first >= from) respond(response, first)
      return response.writableEnded
    }
  }
  const part = (range: string, bytes: number) => (response: ServerResponse) =>
    response.writeHead(206, { 'content-range': range }).end(new Uint8Array(bytes))

  it.each<[string, Behaviour['answer'], RegExp]>([
    ['has no files', (_, response) => !!response.writeHead(404).end(), /neither model.safetensors nor/],
    [
      'denies access',
      (_, response) => !!response.writeHead(403).end(),
      /responded with 403 Forbidden; the file may be private/,
    ],
    [
      'is unavailable',
      (_, response) => !!response.writeHead(503).end(),
      /responded with 503 Service Unavailable; try again later/,
    ],
    [
      'serves an HTML page for every path',
      (_, response) => !!response.writeHead(200, { 'content-type': 'text/html; charset=utf-8' }).end('<!doctype html>'),
      /neither model.safetensors nor/,
    ],
    [
      'serves an empty file',
      (_, response) => !!response.writeHead(416, { 'content-range': 'bytes */0' }).end(),
      /0 bytes are too few/,
    ],
    [
      'sends another range',
      answerFrom(0, part('bytes 1-4194304/99999999', 4 * MB)),
      /sent the range "bytes 1-4194304\/99999999" when asked for bytes 0 to 4194303/,
    ],
    [
      'omits the first byte',
      answerFrom(0, part('bytes 1-4194303/99999999', 4 * MB)),
      /sent the range "bytes 1-4194303/,
    ],
    ['sends a shorter range', answerFrom(0, part('bytes 0-99/99999999', 100)), /sent the range/],
    ['does not know the length', answerFrom(0, part('bytes 0-4194303/*', 4 * MB)), /sent the range/],
    [
      'claims an impossible length',
      answerFrom(0, part('bytes 0-4194303/99999999999999999999', 4 * MB)),
      /sent the range/,
    ],
    ['repeats the first range', answerFrom(1, part(`bytes 0-4194303/${large.length}`, 4 * MB)), /sent the range/],
    [
      'sends fewer bytes than its headers announce',
      answerFrom(1, (response, first) => part(`bytes ${first}-${first + 16 * MB - 1}/${large.length}`, 10)(response)),
      /sent only 10 of the requested 16777216 bytes/,
    ],
    [
      'sends more bytes than its headers announce',
      answerFrom(1, (response, first) =>
        part(`bytes ${first}-${first + 16 * MB - 1}/${large.length}`, 17 * MB)(response),
      ),
      /sent more than the requested 16777216 bytes/,
    ],
    [
      'sends the whole file for a later range',
      answerFrom(1, response => response.writeHead(200).end(large)),
      /the whole file in response to a range request/,
    ],
    ['loses the file', answerFrom(1, response => response.writeHead(404).end()), /responded with 404 Not Found/],
    [
      'changes the size of the file',
      answerFrom(1, (response, first) =>
        part(`bytes ${first}-${first + 16 * MB - 1}/${large.length + 1}`, 16 * MB)(response),
      ),
      /changed while it was read: its size was \d+ bytes and is now \d+/,
    ],
    ['closes the connection', (_, response) => !!response.destroy(), /the request failed/],
    [
      'closes the connection during a response',
      (_, response) => {
        response.writeHead(206, { 'content-range': `bytes 0-4194303/${large.length}`, 'content-length': 4 * MB })
        response.write(new Uint8Array(1000), () => response.destroy())
        return true
      },
      /the connection broke after \d+ bytes/,
    ],
  ])('%s', async (_, answer, fault) => {
    const error = await open(answer)
    expect(error).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringMatching(fault) })
    expect((error as Error).message).toMatch(/^http:\/\/127/)
  })

  it('truncates a file without range requests', async () => {
    const cut = await open((_, response) => !!response.writeHead(200).end(large.subarray(0, 5 * MB)))
    expect(cut).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringContaining('truncated') })
  })

  it.each(['etag', 'last-modified'])('changes the %s of the file', async header => {
    let value = 0
    const error = await open((_, response) => void response.setHeader(header, `"${value++}"`))
    expect(error).toMatchObject({
      message: expect.stringMatching(/the file changed while it was read: .*0.* is now .*1|0.*, now.*1/),
    })
  })

  it('sends its ETag only once, which is no change', async () => {
    let first = true
    const { address } = await site(model, {
      answer: (_, response) => {
        if (first) response.setHeader('etag', '"a"')
        first = false
        return false
      },
    })
    await using checkpoint = await openCheckpoint(address)
    expect((await checkpoint.read('d')).data).toHaveLength(20 * MB)
  })

  it('cannot be reached', async () => {
    const { address } = await site({})
    const error = await failure(openCheckpoint(address.replace(/:\d+$/, ':1')))
    expect(error).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringMatching(/the request failed: .*/) })
  })

  it('fails once, and succeeds on the next read', async () => {
    let broken = true
    const { address } = await site(model, {
      answer: ({ headers }, response) =>
        broken && !headers.range?.startsWith('bytes=0-') && !!response.writeHead(503).end(),
    })
    await using checkpoint = await openCheckpoint(address)
    await expect(checkpoint.read('d')).rejects.toThrow(/503/)
    broken = false
    expect((await checkpoint.read('d')).data).toHaveLength(20 * MB)
  })
})

describe('aborting the signal', () => {
  const reason = new Error('enough')
  const aborted = { code: 'E_ABORTED', cause: reason }

  it('ends a request without a response, and one whose response does not end', async () => {
    for (const responding of [false, true]) {
      const { address } = await site(
        { '/model.safetensors': large },
        {
          answer: (_, response) => {
            if (responding) response.writeHead(206, { 'content-range': `bytes 0-4194303/${large.length}` }).write('x')
            return true
          },
        },
      )
      const stop = new AbortController()
      const opening = failure(openCheckpoint(address, { signal: stop.signal }))
      await new Promise(resolve => setTimeout(resolve, 50))
      stop.abort(reason)
      expect(await opening).toMatchObject(aborted)
    }
  })

  it('rejects later reads, on the web and on disk', async () => {
    const { address } = await site({ '/model.safetensors': large })
    for (const location of [address, fixture('sharded')]) {
      const stop = new AbortController()
      await using checkpoint = await openCheckpoint(location, { signal: stop.signal })
      stop.abort(reason)
      await expect(checkpoint.read(checkpoint.keys()[0])).rejects.toMatchObject(aborted)
    }
  })
})

describe('a list of files', () => {
  const shardFiles = () =>
    Object.entries(sharded).map(([path, bytes]) => new File([Uint8Array.from(bytes)], path.replace('/m/', '')))

  it('opens as a checkpoint', async () => {
    await using here = await openCheckpoint(fixture('sharded'))
    await using there = await openCheckpoint(shardFiles())
    for (const key of here.keys()) expect(await there.read(key)).toEqual(await here.read(key))
    expect(there.info('lm_head.weight').file).toBe('model-00003-of-00003.safetensors')
  })

  it('is read in parts of at most 64 MiB, because each is copied', async () => {
    const bytes = 65 * MB
    const header = rawFile({ a: { dtype: 'U8', shape: [bytes], data_offsets: [0, bytes] } }, 0)
    const content = new Blob([Uint8Array.from(header), new Uint8Array(bytes).fill(7)])
    const parts: number[] = []
    const slice = (begin: number, end: number) => {
      parts.push(end - begin)
      return content.slice(begin, end)
    }
    await using checkpoint = await openCheckpoint([{ name: 'model.safetensors', size: content.size, slice }])
    const { data } = await checkpoint.read('a')
    expect([data.length, data[0], data[bytes - 1]]).toEqual([bytes, 7, 7])
    expect(parts.slice(-2)).toEqual([64 * MB, MB])
  })

  it('is rejected if a file is missing or occurs twice', async () => {
    await expect(openCheckpoint(shardFiles().slice(0, 3))).rejects.toThrow(
      /model-0000\d.*: opening failed: no such file/,
    )
    await expect(openCheckpoint([...shardFiles(), ...shardFiles()])).rejects.toThrow(
      /2 files are named model.safetensors.index.json/,
    )
    await expect(openCheckpoint([])).rejects.toThrow('the given files: the folder has neither')
  })
})
