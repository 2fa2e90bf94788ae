/** @file Entry point outside of browsers: all features are registered at once, and calls are validated. */
import { longTokenMatcher } from './added-tokens.ts'
import { createMatcher } from './aho-corasick.ts'
import { registerAll } from './all-features.ts'
import { register } from './features.ts'
import { features as files } from './files.ts'
import { features as tiktoken } from './tiktoken.ts'
import { validateTokenizerCall } from './tokenizer-calls.ts'
import { validation } from './validation.ts'

registerAll()
register({ ...files, ...tiktoken })
longTokenMatcher.create = createMatcher
validation.check = validateTokenizerCall

export * from './browser.ts'
