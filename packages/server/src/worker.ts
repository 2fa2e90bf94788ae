/** @file What a thread of grammars runs. */
import { parentPort, workerData } from 'node:worker_threads'
import { type GrammarHost, LocalGrammars, type Vocabulary } from './grammar-host.ts'
import type { GrammarCall, GrammarReply } from './grammar-thread.ts'

const answer = async (number: number, work: () => unknown) => {
  try {
    const value = await work()
    const moved = value instanceof Int32Array ? [value.buffer as ArrayBuffer] : []
    parentPort!.postMessage({ number, value } satisfies GrammarReply, moved)
  } catch (error) {
    parentPort!.postMessage({ number, error: (error as Error).message } satisfies GrammarReply)
  }
}

const opening = LocalGrammars.open(workerData as Vocabulary)
parentPort!.on('message', ({ number, method, values }: GrammarCall) =>
  answer(number, async () => {
    const host: GrammarHost = await opening
    return (host[method] as (...values: readonly unknown[]) => unknown)(...values)
  }),
)
await answer(0, async () => void (await opening))
