// Checks the documentation: every ```ts block in README.md, docs/**/*.md and packages/*/README.md must compile against the workspace and
// must run without an error, unless it is marked ```ts no-run; every relative link must point to an existing file.
//
//   node scripts/doc-snippets.ts [FILE.md ...]
//
// Each block is written to a module in a folder below docs/.snippets, at the same line as in its Markdown file, so that line numbers in
// compiler messages and stack traces are those of the Markdown file.
import { spawn } from 'node:child_process'
import { existsSync, globSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join, resolve, sep } from 'node:path'
import { pathToFileURL } from 'node:url'

interface Snippet {
  markdown: string
  line: number
  module: string
  run: boolean
}

mkdirSync('docs/.snippets', { recursive: true })
const folder = mkdtempSync('docs/.snippets/')
process.on('exit', () => rmSync(folder, { recursive: true, force: true }))
const timeoutMs = 120_000
const tsc = 'node_modules/typescript/bin/tsc'

const asked = process.argv.slice(2)
const files =
  asked.length > 0 ? asked : globSync(['README.md', 'docs/**/*.md', 'packages/*/README.md'], { exclude: skip })

const deadLinks: string[] = []
const snippets = files.sort().flatMap(extract)
const failures = [...deadLinks, ...(await typecheck()), ...(await runAll())]
for (const failure of failures) console.error(`${failure}\n`)
const ran = snippets.filter(snippet => snippet.run).length
console.log(`${snippets.length} snippets in ${files.length} files type-checked, ${ran} run, ${failures.length} failed`)
process.exitCode = failures.length > 0 ? 1 : 0

function skip(path: string): boolean {
  return path.includes('node_modules')
}

function extract(markdown: string): Snippet[] {
  const found: Snippet[] = []
  let open: { fence: string; words: string[]; line: number; code: string[] } | undefined
  for (const [index, text] of readFileSync(markdown, 'utf8').split('\n').entries()) {
    if (!open) {
      const [, fence, info] = text.match(/^\s*(`{3,}|~{3,})\s*([^`]*)$/) ?? []
      for (const [, link] of text.matchAll(/\]\((?![a-z]+:|#)([^)\s#]+)/g)) {
        if (!existsSync(join(dirname(markdown), link!)))
          deadLinks.push(`${markdown}:${index + 1}: broken link to ${link}`)
      }
      if (fence) open = { fence, words: (info ?? '').trim().split(/\s+/), line: index + 2, code: [] }
    } else if (text.trim().startsWith(open.fence) && text.trim().replaceAll(open.fence[0]!, '') === '') {
      const { words, line, code } = open
      open = undefined
      if (words[0] !== 'ts' && words[0] !== 'typescript') continue
      const module = join(folder, `${markdown.replace(/\.md$/, '').replaceAll(/[^\w-]+/g, '-')}-${line}.ts`)
      writeFileSync(module, `${'\n'.repeat(line - 1)}${code.join('\n')}\nexport {}\n`)
      found.push({ markdown, line, module, run: !words.includes('no-run') })
    } else open.code.push(text)
  }
  if (open) throw new Error(`${markdown}:${open.line - 1}: unterminated code block`)
  return found
}

/** Compiles all snippets at once and returns messages of the form `README.md:12:3: ...`. */
async function typecheck(): Promise<string[]> {
  if (snippets.length === 0) return []
  // Examples must compile in a new project, for which `tsc --init` chooses these settings, too.
  const compilerOptions = { noUncheckedIndexedAccess: true, exactOptionalPropertyTypes: true }
  const config = { extends: '../../../tsconfig.base.json', compilerOptions, include: ['*.ts'] }
  writeFileSync(join(folder, 'tsconfig.json'), JSON.stringify(config))
  const { code, output } = await execute(process.execPath, [tsc, '-p', folder, '--pretty', 'false'], '.')
  if (code === 0) return []
  // The workspace's own sources are not checked with these settings.
  const messages = output.split(/^(?=\S)/m).filter(message => !/^packages\/\S+\(\d+,\d+\): /.test(message))
  if (messages.length === 0) return []
  return [inMarkdownTerms(messages.join('')).replaceAll(/^(\S+\.md)\((\d+),(\d+)\)/gm, '$1:$2:$3')]
}

async function runAll(): Promise<string[]> {
  const queue = snippets.filter(snippet => snippet.run)
  const problems: string[] = []
  const worker = async () => {
    for (let snippet = queue.shift(); snippet; snippet = queue.shift()) {
      // Each snippet runs in its own folder, because some write files.
      const cwd = snippet.module.replace(/\.ts$/, '')
      mkdirSync(cwd)
      const { code, output } = await execute(process.execPath, [resolve(snippet.module)], cwd)
      if (code === 0) continue
      const why = code === null ? `did not finish within ${timeoutMs / 1000} s` : `exited with code ${code}`
      problems.push(`${snippet.markdown}:${snippet.line}: ${why}\n${inMarkdownTerms(output)}`)
    }
  }
  await Promise.all(Array.from({ length: Math.min(2, availableParallelism()) }, worker))
  return problems
}

function inMarkdownTerms(output: string): string {
  let text = output.trim()
  for (const { module, markdown } of snippets) {
    text = text
      .replaceAll(pathToFileURL(module).href, markdown)
      .replaceAll(resolve(module), markdown)
      // tsc prints paths in this form, also on Windows.
      .replaceAll(module.replaceAll(sep, '/'), markdown)
  }
  return text
}

function execute(program: string, args: string[], cwd: string): Promise<{ code: number | null; output: string }> {
  return new Promise((done, reject) => {
    const child = spawn(program, args, { cwd, stdio: ['ignore', 'pipe', 'pipe'], timeout: timeoutMs })
    let output = ''
    const collect = (chunk: Buffer) => {
      output += chunk
    }
    child.stdout.on('data', collect)
    child.stderr.on('data', collect)
    child.on('error', reject)
    child.on('close', code => done({ code, output }))
  })
}
