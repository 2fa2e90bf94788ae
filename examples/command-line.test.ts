/** @file Command lines of the examples, right and wrong. */
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { flag, integer, list, number, oneOf, positive, readArguments, text, UsageError } from './command-line.ts'

const folder = mkdtempSync(join(tmpdir(), 'moe-command-line-'))
afterAll(() => rmSync(folder, { recursive: true }))
const here = fileURLToPath(new URL('.', import.meta.url))

describe('readArguments', () => {
  const options = {
    name: text('moe'),
    steps: integer(1),
    lr: positive(0.5),
    bias: number(0),
    kind: oneOf(['a', 'b']),
    stop: list(),
    quick: flag(),
  }
  const positionals = { folder: text(), port: integer(0, 80) }
  const read = (line: string) => readArguments(line.split(' ').filter(Boolean), { options, positionals })
  const defaults = { name: 'moe', lr: 0.5, bias: 0, stop: [], quick: false, port: 80 }

  test.each([
    ['', {}],
    ['--steps 3 --lr=1e-3 --bias -2 x 0', { steps: 3, lr: 0.001, bias: -2, folder: 'x', port: 0 }],
    ['--kind b --quick --stop a --stop -b', { kind: 'b', quick: true, stop: ['a', '-b'] }],
    ['--name a --name b -- --quick', { name: 'b', folder: '--quick' }],
  ])('reads %j', (line, values) => {
    expect(read(line)).toEqual({ ...defaults, ...values })
  })

  test.each(['--help', '-h', 'x --steps 1 --help'])('%s asks for help', line => {
    expect(read(line)).toBe('help')
  })

  test.each([
    ['--nope', 'unknown option --nope'],
    ['-x', 'unknown option -x'],
    ['--steps', '--steps needs a value'],
    ['--quick=1', '--quick takes no value, got "1"'],
    ['--steps abc', '--steps is "abc", expected an integer of at least 1'],
    ['--steps 0', '--steps is "0", expected an integer of at least 1'],
    ['--steps 2.5', '--steps is "2.5", expected an integer of at least 1'],
    ['--lr -1', '--lr is "-1", expected a number above 0'],
    ['--bias=', '--bias is "", expected a number'],
    ['--bias Infinity', '--bias is "Infinity", expected a number'],
    ['--kind c', '--kind is "c", expected one of a, b'],
    ['x 1.5', 'PORT is "1.5", expected an integer of at least 0'],
    ['x 1 y', 'unexpected argument "y"'],
  ])('rejects %j', (line, message) => {
    expect(() => read(line)).toThrow(new UsageError(message))
  })
})

const run = (script: string, ...args: readonly string[]) => {
  const { status, stdout, stderr } = spawnSync(process.execPath, [script, ...args], { cwd: folder, encoding: 'utf8' })
  return { status, stdout, stderr }
}

test('commandLine prints help, and errors that say what to do without a stack trace', () => {
  const program = join(folder, 'program.ts')
  writeFileSync(
    program,
    `import { readFileSync } from 'node:fs'
import { commandLine, text } from ${JSON.stringify(join(here, 'command-line.ts'))}
const { file } = commandLine({ command: 'node program.ts', help: 'The help.\\n', positionals: { file: text() } })
if (file === undefined) throw new TypeError('a bug')
readFileSync(file)
`,
  )
  expect(run(program, '--help')).toEqual({ status: 0, stdout: 'The help.\n', stderr: '' })
  const [usage, system, bug] = [run(program, 'a', 'b'), run(program, 'missing.txt'), run(program)]
  expect([usage.status, usage.stderr]).toEqual([2, 'unexpected argument "b"\nSee node program.ts --help.\n'])
  expect([system.status, system.stderr]).toEqual([1, "ENOENT: no such file or directory, open 'missing.txt'\n"])
  expect(bug.status).toBe(1)
  expect(bug.stderr).toMatch(/^TypeError: a bug\n +at .*program\.ts/)
})

const examples = readdirSync(here).filter(name => name.endsWith('.ts') && !/test|calibrate|command-line/.test(name))
test.each(examples)('%s rejects unknown options', name => {
  const { status, stderr } = run(join(here, name), '--nope')
  expect([status, stderr]).toEqual([2, expect.stringMatching(/^unknown option --nope\nSee .+ --help\.\n$/)])
})
