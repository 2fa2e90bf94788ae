// The package graph of the repository, as a rule: who may import whom, and nothing in a circle.
// Tests and benchmarks may import any package that does not depend on theirs (the backend suite, fixtures), sources may not.

/** What the sources of each package may import of the others. The application, not a library, chooses a backend. */
const edges = {
  core: [],
  'backend-tfjs': ['core'],
  'kernels-cpu': ['core'],
  'kernels-cuda': ['core'],
  'kernels-webgpu': ['core'],
  checkpoint: ['core'],
  'attention-mla': ['core'],
  router: ['core'],
  mtp: ['core'],
  'tokenizer-bpe': [],
  deepseek: ['core', 'checkpoint', 'attention-mla', 'router', 'mtp'],
  // Its command opens tokenizers.
  trainer: ['core', 'checkpoint', 'tokenizer-bpe'],
  parallel: ['core'],
  // Their commands open folders, choose a backend and connect ranks: they are applications.
  evaluation: [
    ...['core', 'deepseek', 'tokenizer-bpe', 'parallel'],
    ...['trainer', 'kernels-cuda', 'kernels-cpu', 'backend-tfjs'],
  ],
  server: [
    ...['core', 'deepseek', 'tokenizer-bpe', 'parallel'],
    ...['trainer', 'kernels-cuda', 'kernels-cpu', 'backend-tfjs'],
  ],
}

const notShipped = String.raw`\.(test|bench)\.ts$|/test-[^/]+\.ts$|/scripts/|/(tsup|vitest)\.config\.ts$`

const edgeRules = Object.entries(edges).map(([name, allowed]) => ({
  name: `edges-of-${name}`,
  comment: allowed.length
    ? `@moe/${name} imports only ${allowed.map(to => `@moe/${to}`)}`
    : `@moe/${name} imports no other package`,
  severity: 'error',
  from: { path: `^packages/${name}/`, pathNot: notShipped },
  to: { path: '^packages/([^/]+)/', pathNot: `^packages/(${[name, ...allowed].join('|')})/` },
}))

/** @type {import('dependency-cruiser').IConfiguration} */
export default {
  forbidden: [
    ...edgeRules,
    {
      name: 'package-without-edges',
      comment: 'a new package states its edges in dependency-cruiser.config.mjs',
      severity: 'error',
      from: { path: '^packages/', pathNot: `^packages/(${Object.keys(edges).join('|')})/` },
      to: {},
    },
    {
      name: 'through-the-front-door',
      comment: 'other packages are imported by name (@moe/core), never by a relative path into their folder',
      severity: 'error',
      from: { path: '^packages/([^/]+)/src/' },
      to: { path: '^packages/[^/]+/', pathNot: '^packages/$1/', dependencyTypes: ['local'] },
    },
    {
      name: 'tests-stay-out',
      comment: 'what ships does not import tests or benchmarks',
      severity: 'error',
      from: { path: '^packages/[^/]+/src/', pathNot: notShipped },
      to: { path: String.raw`\.(test|bench)\.ts$|/src/test-[^/]+\.ts$` },
    },
    {
      name: 'no-circles',
      comment: 'files build on each other in one direction, imports of types included',
      severity: 'error',
      from: {},
      to: { circular: true },
    },
    {
      name: 'resolvable',
      comment: 'an import that resolves to nothing: a missing dependency, or an entry that exports does not list',
      severity: 'error',
      from: {},
      // Optional peers are absent here on purpose.
      to: { couldNotResolve: true, pathNot: '^@tensorflow/tfjs-node(-gpu)?$' },
    },
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    // Peers have dependencies outside the workspace; what a page imports only its server knows.
    exclude: { path: '(^|/)(dist|build|fixtures|bench/peers|trainer/page)/' },
    tsConfig: { fileName: 'tsconfig.json' },
    tsPreCompilationDeps: true,
    enhancedResolveOptions: {
      exportsFields: ['exports'],
      conditionNames: ['import', 'node', 'default', 'types'],
      extensions: ['.ts', '.mts', '.mjs', '.js', '.json'],
    },
  },
}
