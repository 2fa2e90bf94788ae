import { existsSync, readdirSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { defineConfig, type TestProjectConfiguration } from 'vitest/config'

/** One project per package with a src folder, so that `pnpm test --project core` runs one package. */
function packageProjects(): TestProjectConfiguration[] {
  return readdirSync('packages')
    .filter(name => existsSync(`packages/${name}/src`))
    .map(name => ({
      extends: true as const,
      test: {
        name,
        root: `packages/${name}`,
        // A software GPU takes up to a minute to compile a large kernel.
        ...(name === 'kernels-webgpu' && { testTimeout: 400_000 }),
        include: ['src/**/*.test.ts', 'scripts/**/*.test.ts'],
        setupFiles: existsSync(`packages/${name}/node_modules/fast-check`)
          ? [`${import.meta.dirname}/scripts/test-properties.ts`]
          : [],
      },
    }))
}

export default defineConfig({
  test: {
    // The native kernels bring a thread pool and process-wide state: one process per file, as many as cores.
    pool: 'forks',
    maxWorkers: Math.min(availableParallelism(), 4),
    testTimeout: 60_000,
    hookTimeout: 60_000,
    projects: [
      ...packageProjects(),
      {
        // The tests of the model parts once more, on the CUDA backend in place of the f64 reference.
        extends: true,
        resolve: {
          alias: {
            '@moe/core/reference': `${import.meta.dirname}/packages/kernels-cuda/src/test-in-place-of-reference.ts`,
          },
        },
        test: {
          name: 'models-on-cuda',
          // The emulator takes about a millisecond for a small op.
          testTimeout: 240_000,
          root: 'packages',
          include: ['{attention-mla,router,mtp,deepseek}/src/**/*.test.ts'],
          // What follows the logits is computed on the host, decoding is recorded on the CPU backend, and commands are processes of their own.
          exclude: ['deepseek/src/{speculative-sampling,constraint,decode-step,cli}.test.ts'],
        },
      },
      {
        extends: true,
        test: { name: 'scripts', root: 'scripts', include: ['**/*.test.ts'] },
      },
      {
        extends: true,
        test: {
          name: 'examples',
          root: 'examples',
          include: ['**/*.test.ts'],
          testTimeout: 300_000,
          // Whole programs that use every core: after the unit tests, one at a time.
          fileParallelism: false,
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
})
