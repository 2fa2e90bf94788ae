/** @file Formats of texts in the EBNF of grammars: fewer texts than JSON Schema and Zod allow, and none that either refuses. */

const DAYS = '"0" [1-9] | [12] [0-9]'
const DATE = [
  '[0-9]{4} "-" (',
  `("01" | "03" | "05" | "07" | "08" | "10" | "12") "-" (${DAYS} | "3" [01])`,
  `| ("04" | "06" | "09" | "11") "-" (${DAYS} | "30")`,
  '| "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])',
  ')',
].join(' ')
const CLOCK = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9]'
const BYTE = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9]? [0-9])'
const HEX = '[0-9a-f]'
const WORD = '[A-Za-z0-9_+\\-]+'
const LABEL = '[A-Za-z0-9]+ ("-" [A-Za-z0-9]+)*'

/** By their names. */
export const formats: Readonly<Record<string, string>> = {
  date: DATE,
  'date-time': `${DATE} "T" ${CLOCK} ("." [0-9]{1,6})? "Z"`,
  uuid: `${HEX}{8} "-" ${HEX}{4} "-" [1-8] ${HEX}{3} "-" [89ab] ${HEX}{3} "-" ${HEX}{12}`,
  ipv4: `${BYTE} "." ${BYTE} "." ${BYTE} "." ${BYTE}`,
  email: `${WORD} ("." ${WORD})* "@" (${LABEL} ".")+ [a-z] [a-z]+`,
}
