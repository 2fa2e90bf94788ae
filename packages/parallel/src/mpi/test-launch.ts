/** @file For tests only: the installed MPI launchers. */
import { spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export interface Launcher {
  readonly command: string
  readonly flags: readonly string[]
  readonly name: string
}

/** One launcher of each kind. Without these flags Open MPI rejects root, and more ranks than cores. */
export function launchers(): Launcher[] {
  const found = new Map<string, Launcher>()
  for (const command of ['mpirun.openmpi', 'mpirun.mpich', 'mpirun']) {
    const { status, stdout } = spawnSync(command, ['--version'], { encoding: 'utf8' })
    if (status !== 0) continue
    const open = /open(mpi|rte| mpi)/i.test(stdout)
    const name = open ? 'Open MPI' : 'MPICH'
    if (!found.has(name))
      found.set(name, { command, name, flags: open ? ['--allow-run-as-root', '--oversubscribe'] : [] })
  }
  return [...found.values()]
}

/** What a rank reports. */
export type Report = { readonly rank: number } & Readonly<Record<string, unknown>>

/** Reports a value: in a file if `launch` started the rank, because launchers interleave long lines of several ranks; else on standard output. */
export function report(value: Report): void {
  const folder = process.env['MOE_TEST_REPORTS']
  if (folder === undefined) process.stdout.write(`${JSON.stringify(value)}\n`)
  else writeFileSync(join(folder, `${value.rank}.json`), JSON.stringify(value))
}

/** Runs a script as `size` ranks, and returns their reports in order. */
export async function launch(
  { command, flags }: Launcher,
  size: number,
  script: readonly string[],
  environment: NodeJS.ProcessEnv = {},
): Promise<{ code: number | null; reports: Report[]; errors: string }> {
  const folder = mkdtempSync(join(tmpdir(), 'moe-ranks-'))
  try {
    const child = spawn(command, [...flags, '-np', String(size), process.execPath, ...script], {
      env: { ...process.env, ...environment, MOE_TEST_REPORTS: folder },
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    let errors = ''
    child.stderr.on('data', chunk => (errors += chunk))
    const code = await new Promise<number | null>(resolve => child.on('close', resolve))
    const reports = readdirSync(folder).map(name => JSON.parse(readFileSync(join(folder, name), 'utf8')) as Report)
    return { code, reports: reports.sort((a, b) => a.rank - b.rank), errors }
  } finally {
    rmSync(folder, { recursive: true })
  }
}
