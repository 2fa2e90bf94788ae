/** @file A command that is called in a way that it does not know. */

export class UsageError extends Error {}
