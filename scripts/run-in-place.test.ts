import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

// A program that takes a while to save after SIGINT, and counts how many it receives.
const program = `
let received = 0
process.on('SIGINT', () => {
  received++
  if (received === 1) setTimeout(() => { console.log('saved, received ' + received); process.exit(7) }, 700)
})
setTimeout(() => {}, 60_000)
console.log('ready ' + process.pid)
`
let folder: string

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'run-in-place-'))
  writeFileSync(join(folder, 'program.mjs'), program)
  writeFileSync(join(folder, 'code.mjs'), 'process.exit(42)')
  writeFileSync(join(folder, 'die.mjs'), "process.kill(process.pid, 'SIGTERM'); setTimeout(() => {}, 60_000)")
  const module = JSON.stringify(new URL('run-in-place.mjs', import.meta.url))
  const driver = `import { runInPlace } from ${module}\nawait runInPlace(process.execPath, [process.argv[2]], { ownGroup: true })\n`
  writeFileSync(join(folder, 'driver.mjs'), driver)
})

afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** Starts the driver with the program `name`, as the leader of a process group, like a command in a terminal. */
function start(name: string): {
  driver: ChildProcess
  output: () => string
  ended: Promise<[number | null, NodeJS.Signals | null]>
} {
  const driver = spawn(process.execPath, [join(folder, 'driver.mjs'), join(folder, name)], { detached: true })
  let output = ''
  driver.stdout.on('data', chunk => {
    output += chunk
  })
  return {
    driver,
    output: () => output,
    ended: new Promise(resolve => driver.on('close', (code, signal) => resolve([code, signal]))),
  }
}

// Process groups and these signals are POSIX.
describe.skipIf(process.platform === 'win32')('runInPlace', () => {
  test('passes on the exit code', async () => {
    expect(await start('code.mjs').ended).toEqual([42, null])
  })

  test('is terminated by the signal that terminated the program', async () => {
    expect(await start('die.mjs').ended).toEqual([null, 'SIGTERM'])
  })

  test('delivers a Ctrl-C that arrives twice, from the terminal and from npm, only once and lets the program finish', async () => {
    const { driver, output, ended } = start('program.mjs')
    await expect.poll(output, { timeout: 30_000 }).toContain('ready')
    process.kill(-driver.pid!, 'SIGINT')
    process.kill(driver.pid!, 'SIGINT')
    expect(await ended).toEqual([7, null])
    expect(output()).toContain('saved, received 1')
  })

  test('interrupts the program if it is killed itself', async () => {
    const { driver, output, ended } = start('program.mjs')
    await expect.poll(output, { timeout: 30_000 }).toContain('ready')
    driver.kill('SIGKILL')
    await ended
    // The pipe stays open until the program has ended, so its output is complete.
    expect(output()).toContain('saved, received 1')
  })
})
