/**
 * @file Whether the API reference says what there is: fails where a public export, member or option has no docstring, where a `{@link}` or a relative
 * link leads nowhere, and where a public signature names a type that is not exported.
 *
 *   node tools/docs/check.ts
 */
import {
  DeclarationReflection,
  type ProjectReflection,
  type Reflection,
  ReflectionKind,
  SignatureReflection,
} from 'typedoc'
import { convert, packages } from './project.ts'

/** What of a package may lack a docstring: what is looked at is named here, so that a new package is. */
const kinds =
  ReflectionKind.Class |
  ReflectionKind.Interface |
  ReflectionKind.TypeAlias |
  ReflectionKind.Variable |
  ReflectionKind.Property |
  ReflectionKind.CallSignature |
  ReflectionKind.ConstructorSignature |
  ReflectionKind.GetSignature

/** Packages whose docstrings are yet to be written. */
const undone = [...['deepseek', 'trainer', 'server', 'parallel', 'kernels-cpu', 'kernels-cuda', 'backend-tfjs']].map(
  name => `@moe/${name}`,
)

const done = packages.filter(({ name }) => !undone.includes(name))

const { app, project, complaints } = await convert()
app.validate(project)
for (const { name } of done) {
  // TypeDoc asks for exports of the project's own package only.
  project.packageName = name
  app.options.setValue('validation', { notExported: true, invalidLink: false })
  app.validate(project)
}
const problems = [...complaints.lines, ...undocumented(project)]
for (const problem of problems) console.error(problem)
const names = project.getReflectionsByKind(kinds).length
console.log(`${names} names of ${packages.length} packages, ${problems.length} problems`)
if (undone.length > 0) console.log(`not looked at: ${undone.join(', ')}`)
if (problems.length > 0) process.exitCode = 1

function undocumented(project: ProjectReflection): string[] {
  return project
    .getReflectionsByKind(kinds)
    .filter(reflection => done.some(({ folder }) => sourceOf(reflection)?.fileName.startsWith(`${folder}/`)))
    .filter(reflection => needsComment(reflection) && !commented(reflection))
    .map(reflection => {
      const source = sourceOf(reflection)
      return `${source?.fileName}:${source?.line}: ${reflection.getFriendlyFullName()} has no docstring`
    })
    .sort()
}

/** Parameters, results and values are described by what has them, inherited members by the class that they come from. */
function needsComment(reflection: Reflection): boolean {
  if (!(reflection instanceof DeclarationReflection) && !(reflection instanceof SignatureReflection)) return false
  const declaration = reflection instanceof SignatureReflection ? reflection.parent : reflection
  if (declaration.inheritedFrom || declaration.flags.isExternal) return false
  // A function or class speaks through its signatures.
  if (reflection instanceof DeclarationReflection && reflection.signatures) return false
  for (let at: Reflection | undefined = reflection.parent; at; at = at.parent) {
    if (at.kindOf(ReflectionKind.Parameter | ReflectionKind.TypeLiteral | ReflectionKind.SomeSignature)) return false
  }
  return true
}

function commented(reflection: Reflection): boolean {
  if (reflection.hasComment()) return true
  // One signature is described with its name; a constructor that has nothing to say, with its class.
  if (!(reflection instanceof SignatureReflection)) return false
  if (reflection.kind === ReflectionKind.ConstructorSignature) return !reflection.parameters?.length
  return reflection.parent.hasComment()
}

function sourceOf(reflection: Reflection) {
  const { sources } = reflection as DeclarationReflection | SignatureReflection
  return sources?.[0]
}
