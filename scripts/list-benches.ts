// `pnpm bench` without a name, or with one that does not exist: says which benchmarks there are.
import { readdirSync, readFileSync } from 'node:fs'

const unknown = process.argv[2]
const names = readdirSync('bench')
  .filter(file => file.endsWith('.ts') && !file.endsWith('.test.ts'))
  .map(file => file.slice(0, -'.ts'.length))
  .sort()
if (unknown !== undefined && !unknown.startsWith('-')) console.error(`bench: there is no bench/${unknown}.ts\n`)
console.log('usage: pnpm bench NAME [arguments]\n')
for (const name of names) console.log(`  ${name.padEnd(18)} ${summary(name)}`)
process.exitCode = unknown === undefined || unknown === '--help' ? 0 : 2

/** The first line of the file's leading comment. */
function summary(name: string): string {
  const source = readFileSync(`bench/${name}.ts`, 'utf8')
  return source.match(/^(?:#!.*\n)?(?:\/\/|\/\*\*?)\s*(?:\*\s*)?([^\n]*)/)?.[1]?.replace(/\s*\*\/$/, '') ?? ''
}
