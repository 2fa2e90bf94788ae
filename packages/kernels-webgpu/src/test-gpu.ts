/** @file For tests only: a GPU, or the reason why there is none here. */
import type { Backend } from '@moe/core'
import { createBackend } from './backend.ts'

/** A backend for all tests of a file; null where there is no GPU. With MOE_REQUIRE_WEBGPU=1 that is an error. */
export async function testBackend(): Promise<Backend | null> {
  try {
    return await createBackend({ software: true })
  } catch (error) {
    if (process.env.MOE_REQUIRE_WEBGPU === '1') throw error
    return null
  }
}
