/** @file For tests only: the MPI launchers that are installed here. */
import { spawn, spawnSync } from 'node:child_process'

export interface Launcher {
  readonly command: string
  readonly flags: readonly string[]
  readonly name: string
}

/** Every launcher once. Open MPI refuses root, and more ranks than cores, unless told otherwise. */
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

/** What a rank prints: a line of JSON. */
export type Printed = { readonly rank: number } & Readonly<Record<string, unknown>>

/** Runs a script as `size` ranks; the lines of JSON that they printed. */
export async function launch(
  { command, flags }: Launcher,
  size: number,
  script: readonly string[],
  environment: NodeJS.ProcessEnv = {},
): Promise<{ code: number | null; lines: Printed[]; errors: string }> {
  const child = spawn(command, [...flags, '-np', String(size), process.execPath, ...script], {
    env: { ...process.env, ...environment },
  })
  let [output, errors] = ['', '']
  child.stdout.on('data', chunk => (output += chunk))
  child.stderr.on('data', chunk => (errors += chunk))
  const code = await new Promise<number | null>(resolve => child.on('close', resolve))
  const lines = output
    .split('\n')
    .filter(line => line.startsWith('{'))
    .map(line => JSON.parse(line) as Printed)
  return { code, lines: lines.sort((a, b) => a.rank - b.rank), errors }
}
