/** @file Registers the features that tokenizer.json files and training may need, without loading them one by one. */
import { features as tokenLookup } from './bpe/token-lookup.ts'
import { register } from './features.ts'
import { features as steps } from './json/pre-tokenizer-steps.ts'
import { features as template } from './json/template.ts'
import { features as normalizer } from './normalizer.ts'
import { features as cl100k } from './scan/cl100k.ts'
import { features as deepseekLlm } from './scan/deepseek-llm.ts'
import { features as deepseekV3 } from './scan/deepseek-v3.ts'
import { features as gpt2 } from './scan/gpt2.ts'
import { features as o200k } from './scan/o200k.ts'
import { fillFromTable } from './unicode/pinned-classes.ts'

export function registerAll(): void {
  fillFromTable()
  register({
    ...deepseekV3,
    ...deepseekLlm,
    ...gpt2,
    ...cl100k,
    ...o200k,
    ...steps,
    ...normalizer,
    ...tokenLookup,
    ...template,
  })
}
