/** @file Random texts for tests: all kinds of characters in unusual combinations. */

const SPACES = [
  '\t',
  '\n',
  '\v',
  '\f',
  '\r',
  ' ',
  '\u0085',
  '\u00a0',
  '\u1680',
  '\u2000',
  '\u2003',
  '\u200a',
  '\u2028',
  '\u2029',
  '\u202f',
  '\u205f',
  '\u3000',
  '\r\n',
]
const MARKS = [
  '\u0300',
  '\u0301',
  '\u0308',
  '\u0323',
  '\u0345',
  '\u05bf',
  '\u0939\u094d',
  '\u3099',
  '\u309a',
  '\u20e3',
  '\ufe0f',
  '\u{1d165}',
  '\u{e0100}',
]
const UNUSUAL = [
  '\0',
  '\u0001',
  '\u001b',
  '\u007f',
  '\u00ad',
  '\u200b',
  '\u200d',
  '\u2060',
  '\ufeff',
  '\ufffd',
  '\uffff',
  '\u0378',
  '\u{e0001}',
  '\u{10ffff}',
  'ſ',
  'K',
  'ß',
  'İ',
  'ǅ',
  'ªº',
  'ʰ',
  'ᾳ',
  '\u212b',
  'ﬁ',
  '½',
  '²',
  'Ⅷ',
  '〇',
  '٣',
  '\u3007',
  '㈠',
  '゠',
  '・',
  '゛',
  'ー',
  '々',
  '\ud7ff',
  '가',
  '龥',
  '龦',
]
const EMOJI = ['🙂', '👍🏽', '👩‍👩‍👧', '🇩🇪', '❤️', '🏴󠁧󠁢󠁥󠁮󠁧󠁿', '🫠']
const WORDS = [
  'the',
  ' The',
  "don't",
  "WE'LL",
  "I'M",
  "it'S",
  "they're",
  "'ſ",
  "x'",
  'camelCaseHTML',
  'ΑΒΓδε',
  'привет',
  'Grüße',
  'naïve',
  '你好世界',
  'ひらがな',
  'カタカナ',
  '한국어',
  'हिन्दी',
  'ภาษาไทย',
  'العربية',
  'return',
  'self.x',
  '==>',
  '/**',
  '*/',
  '://',
  '...',
  '!?',
  '“',
  '”',
  '—',
  '123',
  '4567',
  '3.14',
  '\\n',
  '##',
  '__',
  '$€£',
  '^~`|',
]
const ASCII = Array.from({ length: 95 }, (_, i) => String.fromCharCode(32 + i))

/** Returns a random text of fewer than `length` parts: characters, words, spaces, special tokens, or repetitions. */
export function randomText(random: () => number, length: number, specials: readonly string[]): string {
  const pick = (list: readonly string[]) => list[Math.floor(random() * list.length)]
  const count = Math.floor(random() * length)
  let text = ''
  for (let i = 0; i < count; i++) {
    const kind = random()
    let part: string
    if (kind < 0.25) part = pick(ASCII)
    else if (kind < 0.45) part = pick(WORDS)
    else if (kind < 0.6) part = pick(SPACES)
    else if (kind < 0.68) part = ' '
    else if (kind < 0.75) part = pick(MARKS)
    else if (kind < 0.83) part = pick(UNUSUAL)
    else if (kind < 0.88) part = pick(EMOJI)
    else if (kind < 0.9 && specials.length > 0) part = pick(specials)
    else if (kind < 0.95) {
      let code = Math.floor(random() * (random() < 0.5 ? 0x3100 : 0x11ffff))
      if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) code = 0x4e00 + (code % 0x5200)
      part = String.fromCodePoint(code)
    } else part = text === '' ? 'a' : String.fromCodePoint(text.codePointAt(Math.max(0, text.length - 2))!)
    if (part.isWellFormed?.() === false) part = '\ufffd'
    text += random() < 0.03 ? part.repeat(1 + Math.floor(random() * (random() < 0.05 ? 300 : 12))) : part
  }
  return text
}
