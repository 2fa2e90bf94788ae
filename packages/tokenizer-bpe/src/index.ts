/** @file The package outside of browsers: everything is there at once. */
import { longTokens } from './added-tokens.ts'
import { provideAll } from './all-parts.ts'
import { callCheck } from './call-check.ts'
import { checkCall } from './check-call.ts'
import { parts as files } from './files.ts'
import { startsOf } from './long-tokens.ts'
import { provide } from './parts.ts'
import { parts as tiktoken } from './tiktoken.ts'

provideAll()
provide({ ...files, ...tiktoken })
longTokens.find = startsOf
callCheck.of = checkCall

export * from './browser.ts'
