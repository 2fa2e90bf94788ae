/** @file One text after the other over one session. */
import type { DeepSeek, Generation, SessionOptions, TextTurnOptions } from '@moe/deepseek'
import type { TextEngine } from './text-engine.ts'

/** Texts of a model in the order in which they were asked for. Dispose it before the model. */
export function queuedEngine(model: DeepSeek, options: SessionOptions = {}): TextEngine & { dispose(): void } {
  const session = model.session(options)
  let last: Promise<void> = Promise.resolve()
  let running = 0
  let waiting = 0
  async function* inTurn(text: Generation<string>): AsyncGenerator<string> {
    const before = last
    let done = () => {}
    last = new Promise(resolve => {
      done = resolve
    })
    waiting++
    await before
    waiting--
    running++
    try {
      yield* text
    } finally {
      running--
      done()
    }
  }
  return {
    generate(ids: ArrayLike<number>, turn: TextTurnOptions) {
      const text = session.generate(ids, turn)
      const once = inTurn(text)
      return { stats: text.stats, [Symbol.asyncIterator]: () => once }
    },
    get running() {
      return running
    },
    get waiting() {
      return waiting
    },
    dispose: () => session.dispose(),
  }
}
