"""Writes packages/tokenizer-bpe/fixtures/*.json with Hugging Face tokenizers 0.23.2. Run from the repository root:

  python tools/reference/tokenizer_fixtures.py path/to/deepseek_v3/tokenizer.json
"""

import json
import random
import subprocess
import sys

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FOLDER = "packages/tokenizer-bpe/fixtures"
SEED = 20240501

FIXED = [
    "", " ", "  ", "\n", " \n", "\n ", "\r\n\r\n", "a", " a", "  a", "a ", "a  ", "a\n", "a \n b", "\t\tx", "\u3000\u3000a", "\u00a0b", "\u0085c",
    "Hello, world!", "don't we'll I'M it'S THEY'RE x'ſ 'll'", "123 1234567 12,345.67", "x123y456", " 12 345", "٣٤٥ ½ Ⅷ ²³ 〇",
    "camelCaseHTMLParser ABCdef ǅabc ªB aªB", "naïve cafe\u0301 e\u0301\u0301 \u0301abc \u0301", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "a.b,c;d !x ?y -z +w",
    "foo()\n\n\nbar();\r\n\tbaz // end\n", ".\"\n\n", "...\n...", " ?!\n x", "=>\n", "$5 €6 £7", "“quoted” — dash…", "你好，世界！\n我们。", "漢字かなカナ混じり文、です。ゝゞヽヾ゛゠・ー", "中 国 1中2国", "한국어 텍스트 입니다.",
    "العربية ١٢٣", "हिन्दी में ३ पाठ", "ภาษาไทย", "Ελληνικά ΑΒΓ Русский ТЕКСТ", "🙂 👍🏽👩‍👩‍👧 🇩🇪❤️", "\u200d\u200b\ufeff\u2060x", "\x00\x01\x02 \x7f", "\u0378\u0379 a\u0378b", "\U0010ffff\ue000", "  \u2003 \u2028x\u2029 ", " \u3000!　！a", "☃  ☃ x  ☃  ",
    "<｜begin▁of▁sentence｜>hi<｜end▁of▁sentence｜>", "<｜User｜>a <｜Assistant｜>b<｜tool▁calls▁begin｜>", "<｜begin▁of <｜ <|EOT|>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", " " * 130 + "x", "\n" * 120, "ab" * 80, "的" * 60, "straße STRASSE été ÉTÉ K KELVIN", 'say "one" and "two" aac bc', "HTML5.fooBar.v1.2",
]
PARTS = list("abcXYZ019 .,!'\"-_/\n\t") + [" ", " ", "\r\n", "\u00a0", "\u3000", "\u2003", "\u0085", "\u0301", "\u3099", "'s", "'LL", "the", " The", "ſ", "K", "ß", "ǅ", "ª", "ʰ", "½", "〇", "中", "文字", "かな", "゛", "한", "я", "Я", "é", "🙂", "👍🏽", "\u200d", "\x01", "\u0378", "\ud7ff", "「", "」", "$", "€", "☃"]


def texts(count):
    random.seed(SEED)
    return FIXED + ["".join(random.choice(PARTS) * (random.randint(2, 5) if random.random() < 0.1 else 1) for _ in range(random.randint(1, 14))) for _ in range(count)]


def write(name, value):
    path = f"{FOLDER}/{name}.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"written_by": "tools/reference/tokenizer_fixtures.py", "tokenizers": tokenizers.__version__, "seed": SEED, **value}, file, ensure_ascii=True, separators=(",", ":"))
        file.write("\n")


def with_pre_tokenizer(config, model=None):
    shell = json.loads(Tokenizer(model or models.BPE()).to_str())
    shell["pre_tokenizer"] = config
    return Tokenizer.from_str(json.dumps(shell))


# What a class means outside of brackets, in them, and where case is ignored.
PATTERNS = [r"\w", r"[\w]", r"[^\w\s]", r"[^\W\d_]", r"\W", r"\b.", r"\p{Word}", r"[[:word:]]", r"\p{Punct}", r"[[:punct:]]", r"[[:^punct:]]", r"[[:alnum:]]", r"\d", r"\h", r"\s", r"(?i)\p{Lu}", r"(?i)\P{Lu}", r"(?i)[\p{Lu}]", r"(?i)[^\p{Lu}]", r"(?i)[a-z]", r"(?i)[^a-z]", r"(?i)[à-þ]", r"(?i)k", r"(?i)ſ", r"(?i)ı", r"(?i)ß", r"(?i)ẞ", r"(?i)ᾀ", r"(?i)ᾼ", r"(?i)ΐ", r"(?i)µ", r"(?i)ς", r"(?i)ﬅ"]
CHARACTERS = [*range(0x250), *range(0x370, 0x3d0), *range(0x1e90, 0x1ea0), *range(0x1f80, 0x2000), 0x2028, 0x203f, 0x20ac, 0x212a, 0x212b, 0x2602, *range(0xfb00, 0xfb07)]


def matched(pattern):
    step = pre_tokenizers.Split(Regex(pattern), "removed")
    return [code for code in CHARACTERS if not step.pre_tokenize_str(chr(code))]


ADDED = ["tag", "ta", " a", "é", "a b", "\u200d", "\n", " ", "  ", "<a>", "<a", "Å", "x", ".", "\u0301", "__proto__", "１"]


def files(count):
    """Tokenizers with everything that a file may hold, and what they make of texts."""
    random.seed(SEED)
    chance = lambda p: random.random() < p
    pick = random.choice
    learned = []
    for alphabet in (pre_tokenizers.ByteLevel.alphabet(), []):
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learner.train_from_iterator(["   the tag a b  xé", "   at the <a> tag, x  \n"] * 2, trainers.BpeTrainer(vocab_size=len(alphabet) + 40, min_frequency=1, initial_alphabet=alphabet, show_progress=False))
        learned.append(json.loads(learner.to_str())["model"])
    long = max((token for token in learned[1]["vocab"] if "Ġ" not in token), key=len)
    result = []
    while len(result) < count:
        which = 0 if chance(0.6) else 1
        # The unknown token is a long one or that of a letter, to be told from the bytes that it stands for.
        changed = {"unk_token": pick([long, "x"]) if which else None, "fuse_unk": chance(0.5), "ignore_merges": chance(0.3)}
        shell = json.loads(Tokenizer(models.BPE()).to_str())
        tokenizer = Tokenizer.from_str(json.dumps({**shell, "model": {**learned[which], **changed}}))
        if chance(0.3):
            tokenizer.normalizer = getattr(normalizers, pick(["NFC", "NFD", "NFKC", "NFKD"]))()
        steps = [
            lambda: pre_tokenizers.Split(Regex(pick([r"\p{L}+|\s+", r"[^\w\s]+|a", r"\s+(?!\S)|\S+", r"[[:punct:]]", r"(?i)[a-z]+", r"x*"])), pick(["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]), invert=chance(0.3)),
            lambda: pre_tokenizers.Digits(chance(0.5)),
            lambda: pre_tokenizers.Whitespace(),
            lambda: pre_tokenizers.Metaspace("_", pick(["always", "never", "first", "first"]), chance(0.5)),
        ]
        before = [] if chance(0.5) else [pick(steps)() for _ in range(random.randint(1, 2))]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(chance(0.5), use_regex=chance(0.5))])
        tokenizer.decoder = decoders.ByteLevel()
        for content in random.sample(ADDED, random.randint(0, 6)):
            token = AddedToken(content, lstrip=chance(0.4), rstrip=chance(0.4), single_word=chance(0.3), normalized=chance(0.5))
            (tokenizer.add_special_tokens if chance(0.5) else tokenizer.add_tokens)([token])
        if chance(0.6):
            tokenizer.post_processor = processors.ByteLevel(add_prefix_space=chance(0.5), trim_offsets=chance(0.7))
        cases = []
        for _ in range(9):
            parts = [*ADDED, *random.sample(PARTS, 10), "  ", "   ", "\t", "²", "a", "the", "xx", "!", "zz"]
            text = pick(["", "  ", "   ", " ", "!"]) + "".join(pick(parts) for _ in range(random.randint(0, 14)))
            encodings = []
            for special in (False, True):
                tokenizer.encode_special_tokens = special
                try:
                    encodings.append(tokenizer.encode(text))
                except BaseException:
                    # It panics where an added token lies in white space that another one took.
                    break
            if len(encodings) == 2:
                cases.append({"text": text, "ids": encodings[0].ids, "offsets": [n for o in encodings[0].offsets for n in o], "untrusted": encodings[1].ids})
        file = json.loads(tokenizer.to_str())
        result.append({"model": which, "changed": changed, "rest": {name: file[name] for name in ["normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"]}, "cases": cases})
    return {"models": learned, "files": result}


def main():
    tokenizer = Tokenizer.from_file(sys.argv[1])
    cases = texts(250)
    encodings = [tokenizer.encode(text) for text in cases]
    write("deepseek-v3", {"texts": cases, "ids": [e.ids for e in encodings], "offsets": [[n for o in e.offsets for n in o] for e in encodings[:120]]})

    configs = json.loads(subprocess.run(["node", "packages/tokenizer-bpe/scripts/pre-tokenizer-configs.ts"], check=True, capture_output=True, text=True).stdout)
    few = texts(60)
    result = {}
    for name, config in configs.items():
        pre = with_pre_tokenizer(config).pre_tokenizer
        # Pieces come in the byte alphabet, a character a byte, so their lengths are in bytes.
        result[name] = {"config": config, "lengths": [[len(piece) for piece, _ in pre.pre_tokenize_str(text)] for text in few]}
    write("pre-tokenizers", {"texts": few, "configs": result})

    write("patterns", {"characters": "".join(map(chr, CHARACTERS)), "matches": {pattern: "".join(map(chr, matched(pattern))) for pattern in PATTERNS}})
    write("files", files(66))

    corpus = [text for text in texts(400)] + ["the cat sat on the mat, the cat ate the rat. " * 3, "abcabcabc bcabca aaaa aaaaa aaaaaa", "low lower lowest newer newest wider widest"]
    runs = []
    for name, size, minimum, special, alphabet in [("deepseek-v3", 700, 0, [], True), ("gpt2", 600, 2, ["<|endoftext|>", "<pad>"], True), ("o200k", 500, 0, ["<s>"], False), ("cl100k", 450, 3, [], False), ("deepseek-llm", 500, 0, [], True)]:
        learner = with_pre_tokenizer(configs[name])
        learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, min_frequency=minimum, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [], show_progress=False))
        model = json.loads(learner.to_str())["model"]
        vocab = sorted(model["vocab"], key=model["vocab"].get)
        runs.append({"preTokenizer": name, "vocabSize": size, "minFrequency": minimum, "specialTokens": special, "initialAlphabet": "bytes" if alphabet else "seen", "vocab": vocab, "merges": [" ".join(pair) for pair in model["merges"]]})
    write("train", {"corpus": corpus, "runs": runs})


main()
