// Runs one file of tests in this process: `file.mjs FILE [FROM [NAME]]`, from a number on, those whose name fits. A line of JSON for each step, to standard
// output, or to the pipe that whoever started it holds the other end of.
import { fstatSync, writeSync } from 'node:fs'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { runTests } from 'vitest'

const [file, from = '0', name = ''] = process.argv.slice(2)
const to = piped() ? 3 : 1
await import(pathToFileURL(resolve(file)).href)
const good = await runTests(Number(from), new RegExp(name, 'i'), line => writeSync(to, `${JSON.stringify(line)}\n`))
// Whatever a test left open does not hold up the next file.
process.exit(good ? 0 : 1)

function piped() {
  try {
    return fstatSync(3).isFIFO() || fstatSync(3).isSocket()
  } catch {
    return false
  }
}
