/**
 * @file Set up in every test file that uses properties: a property runs for at most 45 s, its search for a smaller counterexample
 * included. Without a limit this search can take hours in a property of several numbers, and nothing is reported until it ends.
 */
import fc from 'fast-check'

fc.configureGlobal({ interruptAfterTimeLimit: 45_000 })
