/** @file What a thread of EncodePool runs. */
import { parentPort, workerData } from 'node:worker_threads'
import { BpeTokenizer } from '../tokenizer.ts'
import type { BatchReply, BatchRequest } from './pool.ts'

const tokenizer = await BpeTokenizer.fromJSONAsync(workerData as string)

parentPort!.on('message', ({ texts, options }: BatchRequest) => {
  try {
    const parts = texts.map(text => tokenizer.encode(text, options))
    const lengths = Uint32Array.from(parts, part => part.length)
    const ids = new Uint32Array(lengths.reduce((sum, length) => sum + length, 0))
    let at = 0
    for (const part of parts) {
      ids.set(part, at)
      at += part.length
    }
    const reply: BatchReply = { ids, lengths }
    parentPort!.postMessage(reply, [ids.buffer, lengths.buffer])
  } catch (error) {
    parentPort!.postMessage({ error: (error as Error).message } satisfies BatchReply)
  }
})

parentPort!.postMessage(null)
