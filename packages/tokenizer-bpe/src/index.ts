/** @file The package outside of browsers: `fromJSON` reads every file at once. */
import { provideSteps } from './json/pre-tokenizer.ts'
import { compileSteps } from './json/pre-tokenizer-steps.ts'

provideSteps(compileSteps)

export * from './browser.ts'
