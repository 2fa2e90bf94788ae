/** @file Any `pre_tokenizer` of tokenizer.json, step by step. */
import type { Parts } from '../parts.ts'
import { readSteps, runSteps } from '../split-steps.ts'
import type { PreTokenizer } from './pre-tokenizer.ts'

function compileSteps(json: unknown): PreTokenizer {
  const steps = readSteps(json)
  let prepared = new Int32Array(0)
  let next = 0
  return {
    name: 'steps',
    prepare: (bytes, start, end, first) => {
      const text = runSteps(steps, bytes, start, end, first)
      prepared = text.ends
      next = 0
      return text
    },
    scanner: (_bytes, _pos, _end, ends) => {
      const count = Math.min(ends.length, prepared.length - next)
      for (let i = 0; i < count; i++) ends[i] = prepared[next + i]
      next += count
      return count
    },
  }
}

export const parts: Partial<Parts> = { steps: compileSteps }
