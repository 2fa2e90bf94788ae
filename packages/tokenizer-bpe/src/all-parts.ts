/** @file All parts at once. */
import { parts as whole } from './bpe/whole-table.ts'
import { parts as steps } from './json/pre-tokenizer-steps.ts'
import { parts as template } from './json/template.ts'
import { parts as normalizer } from './normalizer.ts'
import { provide } from './parts.ts'
import { parts as cl100k } from './scan/cl100k.ts'
import { parts as deepseekLlm } from './scan/deepseek-llm.ts'
import { parts as deepseekV3 } from './scan/deepseek-v3.ts'
import { parts as gpt2 } from './scan/gpt2.ts'
import { parts as o200k } from './scan/o200k.ts'
import { fillClasses } from './unicode/pinned-classes.ts'

export function provideAll(): void {
  fillClasses()
  provide({
    ...deepseekV3,
    ...deepseekLlm,
    ...gpt2,
    ...cl100k,
    ...o200k,
    ...steps,
    ...normalizer,
    ...whole,
    ...template,
  })
}
