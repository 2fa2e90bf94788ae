/** The setup code of the suite's module, in a page and in Deno. */
export const suiteSetup = {
  setup: `import { createBackend } from '../src/index.ts'
const backend = await createBackend({ software: true })`,
  resolveDir: import.meta.dirname,
}
