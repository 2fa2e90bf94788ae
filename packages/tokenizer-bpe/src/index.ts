/** @file The package outside of browsers: everything is there at once. */
import { provideAll } from './all-parts.ts'

provideAll()

export * from './browser.ts'
