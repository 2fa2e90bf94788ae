// Bundles the backend suite as one module for a web page, for manual checks.
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'
import { inChromium } from './in-chromium.ts'

interface SuiteProgram {
  /** Code at the start of the module, which defines `backend`. Its imports are resolved from `resolveDir`. */
  readonly setup: string
  readonly resolveDir: string
  /** Runs only checks whose name contains this. */
  readonly part?: string
  /** Passed to `backendSuite`. */
  readonly skip?: ReadonlyArray<{ readonly reason: string; readonly checks: readonly string[] }>
}

const suite = fileURLToPath(new URL('../packages/core/src/testing/index.ts', import.meta.url))

/** A module that calls `note(text)` for every failure, and `report({ backend, device, passed, failed })` at the end. */
export async function bundleSuite({ setup, resolveDir, part = '', skip }: SuiteProgram): Promise<string> {
  const { outputFiles } = await build({
    stdin: { contents: `${setup}\n${runSuite(part, skip)}`, resolveDir },
    bundle: true,
    platform: 'browser',
    format: 'esm',
    target: 'es2022',
    write: false,
    logLevel: 'error',
  })
  return outputFiles[0].text
}

const runSuite = (part: string, skip: SuiteProgram['skip']) => `
import { backendSuite } from ${JSON.stringify(suite)}
let passed = 0
let failed = 0
for (const check of backendSuite(async () => backend, ${JSON.stringify({ skip })})) {
  if (!check.name.includes(${JSON.stringify(part)})) continue
  try {
    await check.run()
    passed++
  } catch (error) {
    failed++
    await note(check.name + ': ' + String(error?.message ?? error).slice(0, 300))
  }
}
await report({ backend: backend.name, device: backend.device, passed, failed })
`

/** Runs the suite in headless Chromium, prints the result and sets the exit code. */
export async function suiteInChromium(
  program: SuiteProgram,
  folders?: Readonly<Record<string, string>>,
): Promise<void> {
  const result = (await inChromium(await bundleSuite(program), { folders, seconds: 560 })) as { failed: number }
  console.log(result)
  process.exitCode = result.failed === 0 ? 0 : 1
}
