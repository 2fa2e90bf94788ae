/** @file String formats of JSON Schema as regular expressions. They match only strings that both JSON Schema and Zod accept, but not all of these. */

const DAYS = '0[1-9]|[12][0-9]'
const DATE = `[0-9]{4}-(?:(?:0[13578]|1[02])-(?:${DAYS}|3[01])|(?:0[469]|11)-(?:${DAYS}|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))`
const TIME = '(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?Z'
const AMOUNT = '(?:0|[1-9][0-9]{0,3})'
const SECONDS = `${AMOUNT}S`
const MINUTES = `${AMOUNT}M(?:${SECONDS})?`
const TIMES = `T(?:${AMOUNT}H(?:${MINUTES})?|${MINUTES}|${SECONDS})`
const BYTE = '(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])'
const HEX = '[0-9a-f]'
const WORD = '[A-Za-z0-9_+\\-]+'
const LABEL = '[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*'
const NAME = '[a-z0-9]{1,20}(?:-[a-z0-9]{1,20})?'
const HOST = `${NAME}(?:\\.${NAME}){0,4}`

/** The patterns, by format name. */
export const formats: Readonly<Record<string, string>> = {
  date: DATE,
  time: TIME,
  'date-time': `${DATE}T${TIME}`,
  duration: `P(?:${AMOUNT}D(?:${TIMES})?|${TIMES})`,
  uuid: `${HEX}{8}-${HEX}{4}-[1-8]${HEX}{3}-[89ab]${HEX}{3}-${HEX}{12}`,
  ipv4: `(?:${BYTE}\\.){3}${BYTE}`,
  ipv6: `${HEX}{1,4}(?::${HEX}{1,4}){7}`,
  hostname: HOST,
  email: `${WORD}(?:\\.${WORD})*@(?:${LABEL}\\.)+[a-z][a-z]+`,
  uri: `https?://${HOST}(?:/[A-Za-z0-9_.~\\-]*)*(?:\\?[A-Za-z0-9_.~=&\\-]+)?`,
}

/** Formats that JSON Schema does not define, and that Zod writes beside an equivalent pattern. */
export const patternFormats: ReadonlySet<string> = new Set([
  'base64',
  'base64url',
  'cidrv4',
  'cuid',
  'cuid2',
  'e164',
  'ends_with',
  'includes',
  'ksuid',
  'lowercase',
  'mac',
  'nanoid',
  'starts_with',
  'ulid',
  'uppercase',
  'xid',
])
