/** @file The program of a grammar thread: calls methods of a grammar host and posts the results. */
import { parentPort, workerData } from 'node:worker_threads'
import { type GrammarHost, LocalGrammars, type Vocabulary } from './grammar-host.ts'
import type { GrammarCall, GrammarReply } from './grammar-thread.ts'

const reply = async (number: number, work: () => unknown) => {
  try {
    const value = await work()
    const transfer = value instanceof Int32Array ? [value.buffer as ArrayBuffer] : []
    parentPort!.postMessage({ number, value } satisfies GrammarReply, transfer)
  } catch (error) {
    parentPort!.postMessage({ number, error: (error as Error).message } satisfies GrammarReply)
  }
}

const opening = LocalGrammars.open(workerData as Vocabulary)
parentPort!.on('message', ({ number, method, values }: GrammarCall) =>
  reply(number, async () => {
    const host: GrammarHost = await opening
    return (host[method] as (...values: readonly unknown[]) => unknown)(...values)
  }),
)
await reply(0, async () => void (await opening))
