import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { trainBpe } from './index.ts'

const folder = mkdtempSync(join(tmpdir(), 'moe-tokenizer-cli-'))
afterAll(() => rmSync(folder, { recursive: true }))

function run(args: string[], input = '', options: string[] = []) {
  const cli = fileURLToPath(new URL('cli.ts', import.meta.url))
  const { status, stdout, stderr } = spawnSync(process.execPath, [...options, cli, ...args], {
    input,
    encoding: 'utf8',
    cwd: folder,
  })
  return { status, stdout, stderr }
}

test('trains, encodes, decodes and inspects', () => {
  writeFileSync(join(folder, 'corpus.txt'), 'the cat sat on the mat. '.repeat(20))
  const trained = run(['train', 'corpus.txt', '--vocab-size', '265', '--special', '<eos>', '--json'])
  expect(trained.stderr).toBe('')
  expect(JSON.parse(trained.stdout)).toMatchObject({ path: 'tokenizer.json', vocabSize: 265, merges: 8 })
  const ids = JSON.parse(run(['encode', '--json'], 'the cat<eos>').stdout)
  expect(ids.at(-1)).toBe(0)
  expect(run(['decode', '--skip-special'], ids.join(' ')).stdout).toBe('the cat')
  expect(JSON.parse(run(['inspect', '--json', 'the']).stdout)).toMatchObject({
    vocabSize: 265,
    preTokenizer: 'deepseek-v3',
    specialTokens: 1,
  })
})

test('train expands patterns that the shell left as they are', () => {
  mkdirSync(join(folder, 'parts', 'deep.txt'), { recursive: true })
  for (const [name, word] of [
    ['a.txt', 'cat'],
    ['b.txt', 'mat'],
    ['deep.txt/c.txt', 'hat'],
  ])
    writeFileSync(join(folder, 'parts', name), `the ${word} `.repeat(20))
  const train = (...files: string[]) => {
    const options = ['--vocab-size', '265', '--out', 'parts.json', '--json']
    expect(run(['train', ...files, ...options])).toMatchObject({ status: 0, stderr: '' })
    return readFileSync(join(folder, 'parts.json'), 'utf8')
  }
  expect(train('parts/*.txt')).toBe(train('parts/a.txt', 'parts/b.txt'))
  const all = train('parts/**/*.txt')
  expect(all).toBe(train('parts/a.txt', 'parts/b.txt', 'parts/deep.txt/c.txt'))
  expect(all).not.toBe(train('parts/*.txt'))
  expect(run(['train', 'parts/*.md', '--vocab-size', '265'])).toMatchObject({
    status: 1,
    stderr: 'moe-tokenizer: train: no file matches parts/*.md; check the pattern and the current folder\n',
  })
})

test.skipIf(process.platform === 'win32' /* no bash */)('prints no error if the reader closes the pipe', () => {
  const cli = fileURLToPath(new URL('cli.ts', import.meta.url))
  const text = 'the cat sat on the mat. '.repeat(200_000)
  writeFileSync(join(folder, 'long.txt'), text)
  writeFileSync(join(folder, 'own.json'), JSON.stringify(trainBpe([text], { vocabSize: 265 })))
  const command = '"$0" "$1" encode --json long.txt --tokenizer own.json | head -c 10; echo " $PIPESTATUS"'
  const { stdout, stderr } = spawnSync('bash', ['-c', command, process.execPath, cli], {
    cwd: folder,
    encoding: 'utf8',
  })
  expect(stderr).toBe('')
  expect(stdout).toMatch(/^\[[\d,]{9} 0\n$/)
})

test('exits with 1 for failures and 2 for invalid usage', () => {
  expect(run(['--help'])).toMatchObject({ status: 0 })
  expect(run([])).toMatchObject({ status: 2, stdout: '', stderr: expect.stringContaining('missing COMMAND') })
  expect(run(['bake'])).toMatchObject({
    status: 2,
    stderr: expect.stringContaining('unknown command bake, expected one of train'),
  })
  for (const args of [['bake'], ['train'], ['train', '--nope'], ['decode', 'one'], []]) {
    const { status, stdout, stderr } = run([...args, '--json'])
    expect([status, JSON.parse(stdout).error.code, stderr]).toEqual([2, 'E_USAGE', ''])
  }
  expect(run(['train', 'corpus.txt'])).toMatchObject({
    status: 2,
    stderr: expect.stringContaining('missing --vocab-size N'),
  })
  expect(run(['train', 'corpus.txt', '--vocab-size', 'x']).stderr).toContain('--vocab-size is "x", expected an integer')
  expect(run(['decode', '1', 'x']).stderr).toContain('ID is "x", expected an integer')
  expect(run(['train', '--nope'])).toMatchObject({
    status: 2,
    stderr: 'moe-tokenizer: unknown option --nope\nSee moe-tokenizer --help.\n',
  })
  expect(run(['--version'])).toMatchObject({ status: 0, stdout: expect.stringMatching(/^\d+\.\d+\.\d+\n$/) })
  const small = run(['train', 'corpus.txt', '--vocab-size', '3', '--json'])
  expect(small.status).toBe(1)
  expect(JSON.parse(small.stdout).error.code).toBe('E_CONFIG')
  expect(run(['encode', '--tokenizer', 'missing.json'])).toMatchObject({
    status: 1,
    stderr: expect.stringContaining('ENOENT'),
  })
  for (const args of [
    ['train', folder, '--vocab-size', '300'],
    ['encode', folder],
  ]) {
    expect(run(args)).toMatchObject({ status: 1, stderr: expect.stringMatching(/moe-tokenizer-cli-\S+: EISDIR/) })
  }
})

test('shows progress on a terminal', () => {
  writeFileSync(join(folder, 'corpus.txt'), 'the cat sat on the mat. '.repeat(20))
  const terminal = ['--import', 'data:text/javascript,process.stderr.isTTY=true']
  const args = ['train', 'corpus.txt', '--vocab-size', '265', '--out', 'shown.json']
  const { status, stdout, stderr } = run(args, '', terminal)
  expect([status, stdout]).toEqual([0, expect.stringMatching(/^shown\.json: 265 ids, 9 merges/)])
  expect(stderr).toContain('\r\x1b[Kmerging: 256 of 265 ids')
  expect(run([...args, '--quiet'], '', terminal)).toMatchObject({ status: 0, stderr: '' })
})

test('rejects options of other commands', () => {
  for (const [args, problem] of [
    [['encode', '--skip-special'], 'unknown option --skip-special for encode'],
    [['decode', '1', '--no-special'], 'unknown option --no-special for decode'],
    [['--vocab-size', '300', 'inspect'], 'unknown option --vocab-size for inspect'],
  ] as const)
    expect(run([...args], 'the')).toMatchObject({ status: 2, stdout: '', stderr: expect.stringContaining(problem) })
})

test('inspects a vocabulary whose ids do not start at 0', () => {
  const file = trainBpe(['the cat sat on the mat'], { vocabSize: 260, minFrequency: 1 }).toJSON()
  const model = file.model as { vocab: Record<string, number> }
  for (const token of Object.keys(model.vocab)) model.vocab[token] += 5
  writeFileSync(join(folder, 'late.json'), JSON.stringify(file))
  const { stdout, stderr } = run(['inspect', '--tokenizer', 'late.json', '--json'])
  expect(stderr).toBe('')
  expect(JSON.parse(stdout)).toMatchObject({ vocabSize: 265, longestToken: { bytes: 3 } })
})
