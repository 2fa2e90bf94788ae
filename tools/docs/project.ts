/**
 * @file The documentation as a TypeDoc project: a module for each entry point of a published package, introduced by its README, and the Markdown files of
 * docs/ as documents.
 */
import { globSync, readFileSync } from 'node:fs'
import { dirname, join, posix, relative, resolve } from 'node:path'
import {
  Application,
  Comment,
  type CommentDisplayPart,
  Converter,
  DeclarationReflection,
  type DocumentationEntryPoint,
  type DocumentReflection,
  Logger,
  LogLevel,
  MinimalSourceFile,
  type NormalizedPath,
  normalizePath,
  OptionDefaults,
  type ProjectReflection,
  ReferenceType,
  type Reflection,
  ReflectionKind,
  SignatureReflection,
  StructureRouter,
} from 'typedoc'
import ts from 'typescript'

export const root = resolve(import.meta.dirname, '../..')

interface Manifest {
  name: string
  private?: boolean
  exports: Record<string, string>
  repository: { url: string }
}

interface Token {
  type: string
  info: string
}

interface Package {
  name: string
  folder: string
}

const repository = read('packages/core/package.json').repository.url.replace(/^git\+|\.git$/g, '')

/** The order of packages for newcomers; others come after these. */
const order = [
  ...[
    'core',
    'deepseek',
    'trainer',
    'tokenizer-bpe',
    'server',
    'evaluation',
    'attention-mla',
    'router',
    'mtp',
    'checkpoint',
  ],
  ...['parallel', 'kernels-cpu', 'kernels-cuda', 'kernels-webgpu', 'backend-tfjs'],
]

const documentGroups: [group: string, files: string[]][] = [
  ['Guides', inOrderOf('docs/README.md', 'docs/guides/*.md')],
  ['Studies', ['docs/studies/README.md', 'docs/log.md', ...all('docs/log/*.md')]],
  ['Contributing', ['CONTRIBUTING.md', ...all('docs/contributing/*.md'), 'packages/kernels-cuda/device/README.md']],
  ['Decision records', ['docs/adr/README.md', ...all('docs/adr/0*.md')]],
]

export const packages: Package[] = all('packages/*/package.json')
  .filter(file => !read(file).private)
  .map(file => ({ folder: dirname(file), name: read(file).name }))
  .sort((a, b) => place(a) - place(b) || a.folder.localeCompare(b.folder))

/** Collects TypeDoc's warnings and errors. */
export class Complaints extends Logger {
  readonly lines: string[] = []

  protected override addContext(message: string, _level: LogLevel, ...at: [ts.Node?] | [number, MinimalSourceFile]) {
    const [position, file] = at
    if (typeof position !== 'number' || !file) return message
    return `${fromRoot(file.fileName)}:${file.getLineAndCharacterOfPosition(position).line + 1}: ${message}`
  }

  override log(message: string, level: LogLevel) {
    super.log(message, level)
    if (level >= LogLevel.Warn && level < LogLevel.None) this.lines.push(message)
  }
}

/** Gives pages the paths of their sources: docs/guides/errors.html, core/Tensor.html. */
class PathsOfRepository extends StructureRouter {
  protected override getIdealBaseName(reflection: Reflection): string {
    if (reflection.isDocument()) {
      return fromRoot(reflection.project.files.getReflectionPath(reflection)!).replace(/\.md$/, '')
    }
    return super.getIdealBaseName(reflection).replace(/^_moe\//, '')
  }
}

export async function convert(): Promise<{ app: Application; project: ProjectReflection; complaints: Complaints }> {
  const complaints = new Complaints()
  const app = await Application.bootstrap({
    name: '@moe',
    readme: join(root, 'README.md'),
    projectDocuments: documentGroups.flatMap(([, files]) => files.map(file => join(root, file))),
    basePath: root,
    blockTags: [...OptionDefaults.blockTags, '@file'],
    excludeTags: ['@file'],
    excludeInternal: true,
    excludePrivate: true,
    excludeExternals: true,
    sortEntryPoints: false,
    sort: ['kind', 'instance-first', 'alphabetical-ignoring-documents'],
    locales: { en: { kind_module: 'Package', kind_plural_module: 'Packages', kind_plural_type_alias: 'Types' } },
    groupOrder: [
      ...['Guides', 'Packages', 'Studies', 'Contributing', 'Decision records'],
      ...['Classes', 'Functions', 'Interfaces', 'Types', 'Variables'],
      ...['Constructors', 'Properties', 'Accessors', 'Methods'],
    ],
    router: 'repository',
    typePrintWidth: 100,
    markdownLinkExternal: false,
    githubPages: true,
    hideGenerator: true,
    includeHierarchySummary: false,
    useFirstParagraphOfCommentAsSummary: true,
    searchInComments: true,
    searchInDocuments: true,
    navigation: { includeGroups: true, includeCategories: false, includeFolders: false },
    navigationLinks: { GitHub: repository },
    headings: { readme: false, document: true },
    lightHighlightTheme: 'github-light',
    darkHighlightTheme: 'github-dark',
    highlightLanguages: ['bash', 'c', 'cpp', 'css', 'html', 'js', 'json', 'jsonc', 'python', 'sh', 'ts', 'yaml'],
    ignoredHighlightLanguages: ['text'],
    markdownItLoader: plainWithoutLanguage,
    customCss: normalizePath(join(import.meta.dirname, 'style.css')),
    validation: { notExported: false, invalidLink: true, invalidPath: false, rewrittenLink: false },
  })
  app.logger = complaints
  app.converter.on(Converter.EVENT_CREATE_DOCUMENT, (_context, document) => entitle(app, document))
  app.renderer.defineRouter('repository', PathsOfRepository)
  const project = app.converter.convert(entryPoints())
  introduce(app, project)
  keepOwnWords(project)
  keepOrder(project)
  complaints.lines.push(...leadToRepository(project))
  return { app, project, complaints }
}

/** One for each TypeScript entry in `exports`, with the name that users import. */
function entryPoints(): DocumentationEntryPoint[] {
  const files = packages.flatMap(({ folder, name }) =>
    Object.entries(read(join(folder, 'package.json')).exports)
      .filter(([, file]) => file.endsWith('.ts'))
      .map(([path, file]) => ({ displayName: posix.join(name, path), file: normalizePath(join(root, folder, file)) })),
  )
  const config = ts.readConfigFile(join(root, 'tsconfig.base.json'), ts.sys.readFile).config
  const { options } = ts.parseJsonConfigFileContent({ ...config, files: [] }, ts.sys, root)
  const program = ts.createProgram(
    files.map(({ file }) => file),
    options,
  )
  return files.map(({ displayName, file }) => ({ displayName, program, sourceFile: program.getSourceFile(file)! }))
}

/** Takes a document's title from its first heading. */
function entitle(app: Application, document: DocumentReflection) {
  const files = document.project.files
  const path = files.getReflectionPath(document)!
  const { title, body } = parts(path)
  document.name = title.replaceAll('`', '')
  document.content = app.converter.parseRawComment(body, files).content
  document.frontmatter['group'] = documentGroups.find(([, members]) => members.includes(fromRoot(path)))![0]
  // As on GitHub, a link to a folder leads to its README.
  if (path.endsWith('/README.md')) files.registerReflectionPath(normalizePath(dirname(path)), document)
}

function parts(markdown: string): { title: string; body: MinimalSourceFile } {
  const text = readFileSync(markdown, 'utf8')
  const [heading = '', title = ''] = /^# (.+)\n+/.exec(text) ?? []
  return { title, body: new MinimalSourceFile(text.slice(heading.length), normalizePath(markdown)) }
}

/** Leaves code blocks without a language plain; TypeDoc would highlight them as TypeScript. */
function plainWithoutLanguage(parser: {
  core: { ruler: { push(name: string, rule: (state: { tokens: Token[] }) => void): void } }
}) {
  parser.core.ruler.push('plain', ({ tokens }) => {
    for (const token of tokens) if (token.type === 'fence' && !token.info) token.info = 'text'
  })
}

/** Introduces packages by their READMEs and other entry points by their first comment. */
function introduce(app: Application, project: ProjectReflection) {
  for (const module of project.children ?? []) {
    const entry = packages.find(({ name }) => name === module.name)
    if (entry) {
      const path = normalizePath(join(root, entry.folder, 'README.md'))
      module.readme = app.converter.parseRawComment(parts(path).body, project.files).content
      project.files.registerReflectionPath(path, module)
      project.files.registerReflectionPath(normalizePath(dirname(path)), module)
    } else {
      const source = readFileSync(module.sources![0].fullFileName, 'utf8')
      const [, text = ''] = /^\/\*\*\s*\*?\s*@file ([\s\S]*?)\s*\*\//.exec(source) ?? []
      module.comment = new Comment([{ kind: 'text', text: text.replaceAll(/\n \* ?/g, '\n') }])
    }
  }
}

/** Removes docstrings that TypeDoc copies from the extended type, which describe something else. */
function keepOwnWords(project: ProjectReflection) {
  const types = project.getReflectionsByKind(ReflectionKind.ClassOrInterface) as DeclarationReflection[]
  const copies = types.filter(({ comment, extendedTypes = [] }) =>
    extendedTypes.some(extended => {
      const original = extended instanceof ReferenceType ? extended.reflection?.comment : undefined
      return comment !== undefined && original !== undefined && comment.similarTo(original)
    }),
  )
  for (const type of copies) delete type.comment
}

/** Keeps the members of a type in source order, with inherited ones last. */
function keepOrder(project: ProjectReflection) {
  for (const type of project.getReflectionsByKind(ReflectionKind.ClassOrInterface) as DeclarationReflection[]) {
    const own = fileOf(type)
    const position = (member: Reflection) => (fileOf(member) === own ? 0 : 1e6) + (lineOf(member) ?? 0)
    const byPosition = (a: Reflection, b: Reflection) => position(a) - position(b)
    for (const member of type.children ?? []) asDeclared(member)
    type.children?.sort(byPosition)
    for (const group of type.groups ?? []) group.children.sort(byPosition)
  }
}

const fileOf = (reflection: Reflection) => (reflection as DeclarationReflection).sources?.[0]?.fullFileName
const lineOf = (reflection: Reflection) => (reflection as DeclarationReflection).sources?.[0]?.line

/** For members of computed types (such as `Omit`): removes links to declarations that have no page, and default values of interface members. */
function asDeclared(member: DeclarationReflection) {
  if (member.parent?.kindOf(ReflectionKind.Interface)) delete member.defaultValue
  for (const item of [member, ...(member.signatures ?? [])]) {
    if (!item.inheritedFrom?.reflection) delete item.inheritedFrom
    if (!item.overwrites?.reflection) delete item.overwrites
  }
}

/** Points links to sources, and to files that are not pages of the site, to the repository. Returns the broken links. */
function leadToRepository(project: ProjectReflection): string[] {
  const dead: string[] = []
  const url = (path: string) => `${repository}/blob/main/${path}`
  for (const reflection of Object.values(project.reflections)) {
    for (const part of partsOf(reflection)) {
      if (part.kind !== 'relative-link') continue
      const target = part.target === undefined ? undefined : project.files.resolve(part.target, project)
      if (target === undefined)
        dead.push(`${reflection.getFriendlyFullName()} links to ${part.text}, which does not exist`)
      if (typeof target !== 'string' || isImage(target)) continue
      part.text = url(fromRoot(target)) + (part.targetAnchor ? `#${part.targetAnchor}` : '')
      part.target = undefined
    }
    if (!(reflection instanceof DeclarationReflection) && !(reflection instanceof SignatureReflection)) continue
    for (const source of reflection.sources ?? []) {
      source.fileName = fromRoot(source.fullFileName)
      source.url = `${url(source.fileName)}#L${source.line}`
    }
  }
  return dead
}

function isImage(path: string): boolean {
  return /\.(svg|png|jpg)$/.test(path)
}

function fromRoot(path: string): NormalizedPath {
  return normalizePath(relative(root, path))
}

function partsOf(reflection: Reflection): CommentDisplayPart[] {
  const ofComment = (comment?: Comment) =>
    comment ? [comment.summary, ...comment.blockTags.map(tag => tag.content)].flat() : []
  const readme = reflection.isProject() || reflection.isDeclaration() ? (reflection.readme ?? []) : []
  return [...ofComment(reflection.comment), ...readme, ...(reflection.isDocument() ? reflection.content : [])]
}

function place({ folder }: Package): number {
  const index = order.indexOf(folder.replace('packages/', ''))
  return index < 0 ? order.length : index
}

function read(manifest: string): Manifest {
  return JSON.parse(readFileSync(join(root, manifest), 'utf8'))
}

function all(pattern: string): string[] {
  return globSync(pattern, { cwd: root })
    .map(file => file.replaceAll('\\', '/'))
    .sort()
}

/** A page, the pages that it links to, in that order, and the remaining pages that match the pattern. */
function inOrderOf(page: string, pattern: string): string[] {
  const text = readFileSync(join(root, page), 'utf8')
  const linked = [...text.matchAll(/\]\(([^)\s#]+\.md)/g)].map(([, link]) => posix.join(posix.dirname(page), link))
  const rank = (file: string) => linked.indexOf(file) + 1 || linked.length + 1
  return [page, ...all(pattern).sort((a, b) => rank(a) - rank(b))]
}
