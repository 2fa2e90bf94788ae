// Lists the benchmarks for `pnpm bench` without a name or with an unknown one, and describes one for `pnpm bench NAME --help`.
import { existsSync, readdirSync, readFileSync } from 'node:fs'

const asked = process.argv[2]
const fileOf = (name: string) => `bench/${name}.ts`
if (asked !== undefined && existsSync(fileOf(asked))) {
  console.log(comment(asked).join('\n'))
} else {
  const help = asked === undefined || asked.startsWith('-')
  if (!help) console.error(`bench: unknown benchmark ${asked}\n`)
  console.log('usage: pnpm bench NAME [arguments], or pnpm bench NAME --help\n')
  const names = readdirSync('bench')
    .filter(file => file.endsWith('.ts') && !file.endsWith('.test.ts'))
    .map(file => file.slice(0, -'.ts'.length))
    .sort()
  for (const name of names) console.log(`  ${name.padEnd(18)} ${comment(name)[0] ?? ''}`)
  process.exitCode = help ? 0 : 2
}

/** The lines of the file's leading comment. */
function comment(name: string): string[] {
  const [, text = ''] = /^\s*\/\*\*?([\s\S]*?)\*\//.exec(readFileSync(fileOf(name), 'utf8')) ?? []
  return text
    .split('\n')
    .map(line => line.replace(/^ *\* ?/, '').replace(/^\s*@file /, ''))
    .join('\n')
    .trim()
    .split('\n')
}
