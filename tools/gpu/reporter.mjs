// A reporter of Node's test runner: one JSON object with the counts and every failure.
export default async function* reporter(source) {
  const result = { passed: 0, failed: 0, skipped: 0, failures: [] }
  for await (const { type, data } of source) {
    if (type !== 'test:pass' && type !== 'test:fail') continue
    if (data.details.type === 'suite') continue
    if (data.skip !== undefined) result.skipped++
    else if (type === 'test:pass') result.passed++
    else {
      result.failed++
      const error = data.details.error?.cause ?? data.details.error
      result.failures.push({ name: data.name, file: data.file, error: String(error?.message ?? error).slice(0, 2000) })
    }
  }
  yield `${JSON.stringify(result, null, 2)}\n`
}
