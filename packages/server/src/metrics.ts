/** @file Metrics in Prometheus' text format 0.0.4. */
import type { RequestRecord } from './request-record.ts'
import type { TextEngine } from './text-engine.ts'

export const METRICS_TYPE = 'text/plain; version=0.0.4; charset=utf-8'

/** All other paths share one label, since clients could create any number of them. */
const countedPaths = new Set([
  '/v1/models',
  '/v1/completions',
  '/v1/chat/completions',
  '/v1/responses',
  '/health',
  '/metrics',
])

export class Metrics {
  readonly #engine: TextEngine
  readonly #requests = new Map<string, number>()
  #promptTokens = 0
  #generatedTokens = 0
  #texts = { count: 0, seconds: 0 }

  constructor(engine: TextEngine) {
    this.#engine = engine
  }

  add({ path, status, seconds, promptTokens, generatedTokens }: RequestRecord): void {
    const labels = `path="${countedPaths.has(path) ? path : 'other'}",status="${status}"`
    this.#requests.set(labels, (this.#requests.get(labels) ?? 0) + 1)
    if (promptTokens === undefined) return
    this.#promptTokens += promptTokens
    this.#generatedTokens += generatedTokens ?? 0
    this.#texts.count++
    this.#texts.seconds += seconds
  }

  toString(): string {
    const { running, waiting } = this.#engine
    const { count, seconds } = this.#texts
    const requests = [...this.#requests].map(([labels, n]) => [`{${labels}}`, n] as const)
    return [
      metric('moe_requests_total', 'counter', 'Finished requests.', requests),
      metric('moe_texts_running', 'gauge', 'Texts being generated.', [['', running]]),
      metric('moe_texts_waiting', 'gauge', 'Texts waiting to be started.', [['', waiting]]),
      metric('moe_prompt_tokens_total', 'counter', 'Prompt tokens.', [['', this.#promptTokens]]),
      metric('moe_generated_tokens_total', 'counter', 'Generated tokens.', [['', this.#generatedTokens]]),
      metric('moe_request_seconds', 'summary', 'Duration of requests that generated texts.', [
        ['_sum', seconds],
        ['_count', count],
      ]),
    ].join('')
  }
}

function metric(name: string, type: string, help: string, samples: ReadonlyArray<readonly [string, number]>): string {
  const lines = samples.map(([suffix, value]) => `${name}${suffix} ${value}\n`)
  return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${lines.join('')}`
}
