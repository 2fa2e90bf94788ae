// Runs the tests of one file in this process: `file.mjs FILE [FROM [NAME]]`, starting with test number FROM, and only those whose name matches NAME. Reports each
// step as a line of JSON, to standard output or to the file descriptor in MOE_TEST_REPORT.
import { writeSync } from 'node:fs'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { runTests } from 'vitest'

const [file, from = '0', name = ''] = process.argv.slice(2)
const to = Number(process.env.MOE_TEST_REPORT ?? 1)
await import(pathToFileURL(resolve(file)).href)
const good = await runTests(Number(from), new RegExp(name, 'i'), line => writeSync(to, `${JSON.stringify(line)}\n`))
// Exit even if a test has left something open.
process.exit(good ? 0 : 1)
