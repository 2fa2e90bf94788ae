// Runs one file of tests in this process: `file.mjs FILE [FROM [NAME]]`, from a number on, those whose name fits. A line of JSON for each step, to standard
// output or to the file descriptor that MOE_TEST_REPORT names.
import { writeSync } from 'node:fs'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { runTests } from 'vitest'

const [file, from = '0', name = ''] = process.argv.slice(2)
const to = Number(process.env.MOE_TEST_REPORT ?? 1)
await import(pathToFileURL(resolve(file)).href)
const good = await runTests(Number(from), new RegExp(name, 'i'), line => writeSync(to, `${JSON.stringify(line)}\n`))
// Whatever a test left open does not hold up the next file.
process.exit(good ? 0 : 1)
