/**
 * @file Checks the API reference. It fails if a public export, member or option has no docstring, if a `{@link}` or a relative link is broken, or if a public
 * signature uses a type that is not exported.
 *
 *   node tools/docs/check.ts
 */
import { existsSync, globSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import {
  type Comment,
  DeclarationReflection,
  IntersectionType,
  type ParameterReflection,
  type ProjectReflection,
  type Reflection,
  ReflectionKind,
  ReflectionType,
  SignatureReflection,
} from 'typedoc'
import { convert, packages, root } from './project.ts'

/** Kinds of reflections that need a docstring. */
const kinds =
  ReflectionKind.Class |
  ReflectionKind.Interface |
  ReflectionKind.TypeAlias |
  ReflectionKind.Variable |
  ReflectionKind.Property |
  ReflectionKind.CallSignature |
  ReflectionKind.ConstructorSignature |
  ReflectionKind.GetSignature

/** Types that public signatures use but no entry point exports yet. */
const toBeExported: Readonly<Record<string, readonly string[]>> = {
  '@moe/deepseek': ['Trunk', 'DecoderLayerInit'],
  '@moe/trainer': ['RunRecord'],
}

const { app, project, complaints } = await convert()
app.validate(project)
for (const { name } of packages) {
  // TypeDoc only requires exports of types from the project's own package.
  project.packageName = name
  app.options.setValue('intentionallyNotExported', [...(toBeExported[name] ?? [])])
  app.options.setValue('validation', { notExported: true, invalidLink: false })
  app.validate(project)
}
const problems = [...withoutIntroduction(project), ...undocumented(project), ...unnamedOptions(project)]
const out = mkdtempSync(join(tmpdir(), 'moe-docs-'))
try {
  await app.generateDocs(project, out)
  problems.push(...deadLinks(out))
} finally {
  rmSync(out, { recursive: true, force: true })
}
problems.unshift(...complaints.lines)
for (const problem of problems) console.error(problem)
const names = project.getReflectionsByKind(kinds).length
console.log(`${names} names of ${packages.length} packages, ${problems.length} problems`)
if (problems.length > 0) process.exitCode = 1

/** Broken links and anchors of the finished pages, resources loaded from other sites, and absolute paths of this machine. */
function deadLinks(folder: string): string[] {
  const pages = new Map(
    globSync('**/*.html', { cwd: folder }).map(page => [page, readFileSync(join(folder, page), 'utf8')] as const),
  )
  const anchors = new Map([...pages].map(([page, text]) => [page, new Set(idsOf(text))]))
  const problems: string[] = []
  for (const [page, text] of pages) {
    if (text.includes(root)) problems.push(`${page} contains a path of this machine`)
    for (const [, tag, link] of text.matchAll(/<(\w+)[^>]*?\s(?:href|src)="([^"]*)"/g)) {
      if (/^(https?:|mailto:|data:)/.test(link)) {
        if (tag !== 'a') problems.push(`${page} loads ${link}`)
        continue
      }
      const [path, anchor] = link.split('#')
      const target = path === '' ? page : join(dirname(page), decodeURIComponent(path.replace(/\?.*/, '')))
      if (!pages.has(target) && !existsSync(join(folder, target)))
        problems.push(`${page} links to ${link}: no such file`)
      else if (anchor && pages.has(target) && !anchors.get(target)!.has(decodeURIComponent(anchor))) {
        problems.push(`${page} links to ${link}: no such heading`)
      }
    }
  }
  return problems
}

function idsOf(html: string): string[] {
  return [...html.matchAll(/\sid="([^"]+)"/g)].map(([, id]) => id)
}

/** Entry points with neither a README nor an introductory comment. */
function withoutIntroduction(project: ProjectReflection): string[] {
  return (project.children ?? [])
    .filter(module => !module.readme && textOf(module.comment) === '')
    .map(module => `${sourceOf(module)?.fileName}:1: ${module.name} does not say in a comment \`@file\` what it is`)
}

function undocumented(project: ProjectReflection): string[] {
  return project
    .getReflectionsByKind(kinds)
    .filter(reflection => needsComment(reflection) && !commented(reflection))
    .map(reflection => {
      const source = sourceOf(reflection)
      return `${source?.fileName}:${source?.line}: ${reflection.getFriendlyFullName()} has no docstring`
    })
    .sort()
}

/** Inline options whose names do not appear in the docstring of the function that takes them. */
function unnamedOptions(project: ProjectReflection): string[] {
  const parameters = project.getReflectionsByKind(ReflectionKind.Parameter) as ParameterReflection[]
  return parameters
    .filter(({ name }) => name === 'options' || name === 'settings')
    .flatMap(({ type, comment, parent }) => {
      const parts = type instanceof IntersectionType ? type.types : [type]
      const options = parts.flatMap(part => (part instanceof ReflectionType ? (part.declaration.children ?? []) : []))
      const words = [comment, parent?.comment, parent?.parent?.comment].map(textOf).join('\n')
      const missing = options.filter(option => !option.hasComment() && !new RegExp(`\\b${option.name}\\b`).test(words))
      const source = parent && sourceOf(parent)
      return missing.map(
        ({ name }) =>
          `${source?.fileName}:${source?.line}: the docstring of ${parent?.getFriendlyFullName()} says nothing of the option ${name}`,
      )
    })
}

function textOf(comment: Comment | undefined): string {
  if (comment === undefined) return ''
  return [comment.summary, ...comment.blockTags.map(tag => tag.content)]
    .flatMap(parts => parts.map(part => part.text))
    .join('')
}

/** Parameters, results and values are described by their owner, inherited members by the class that declares them. */
function needsComment(reflection: Reflection): boolean {
  if (!(reflection instanceof DeclarationReflection) && !(reflection instanceof SignatureReflection)) return false
  const declaration = reflection instanceof SignatureReflection ? reflection.parent : reflection
  if (declaration.inheritedFrom || declaration.flags.isExternal) return false
  // A function is described by its signatures.
  if (reflection instanceof DeclarationReflection && reflection.signatures) return false
  for (let at: Reflection | undefined = reflection.parent; at; at = at.parent) {
    if (at.kindOf(ReflectionKind.Parameter | ReflectionKind.TypeLiteral | ReflectionKind.SomeSignature)) return false
  }
  return true
}

/** A single signature may be described at its name, and a simple constructor by its class. */
function commented(reflection: Reflection): boolean {
  if (reflection.hasComment()) return true
  if (!(reflection instanceof SignatureReflection)) return false
  const { kind, parameters = [], parent } = reflection
  if (kind !== ReflectionKind.ConstructorSignature) return parent.hasComment()
  return parameters.length === 0 || parameters.some(parameter => parameter.hasComment())
}

function sourceOf(reflection: Reflection) {
  const { sources } = reflection as DeclarationReflection | SignatureReflection
  return sources?.[0]
}
