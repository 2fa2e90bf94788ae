/** @file The package outside of browsers: everything is there at once. */
import { longTokens } from './added-tokens.ts'
import { provideAll } from './all-parts.ts'
import { startsOf } from './long-tokens.ts'

provideAll()
longTokens.find = startsOf

export * from './browser.ts'
