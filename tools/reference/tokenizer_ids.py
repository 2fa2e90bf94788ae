"""Ids that Hugging Face tokenizers or tiktoken give for a JSON list of texts; run by packages/tokenizer-bpe/scripts/compare.ts.

  python tools/reference/tokenizer_ids.py huggingface tokenizer.json texts.json ids.bin
  python tools/reference/tokenizer_ids.py tiktoken cl100k_base.tiktoken texts.json ids.bin

Writes uint32 numbers: for each text how many ids, then the ids. Special tokens in the texts are read, none are added.
"""

import array
import base64
import json
import os
import sys


def huggingface(path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    return lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def tiktoken(path):
    import tiktoken
    import tiktoken.load
    import tiktoken_ext.openai_public as public

    with open(path) as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file)}
    with open(path + ".json") as file:
        special = json.load(file)
    # The pattern comes from the package itself; its own rank files need a download.
    public.load_tiktoken_bpe = lambda *args, **kwargs: ranks
    public.data_gym_to_mergeable_bpe_ranks = lambda *args, **kwargs: ranks
    name = os.path.basename(path).split(".")[0]
    arguments = getattr(public, name)()
    arguments.pop("explicit_n_vocab", None)
    arguments["special_tokens"] = special
    encoding = tiktoken.Encoding(**arguments)
    return lambda texts: encoding.encode_batch(texts, num_threads=2, allowed_special="all")


def main():
    kind, source, texts_path, target = sys.argv[1:]
    encode = {"huggingface": huggingface, "tiktoken": tiktoken}[kind](source)
    with open(texts_path, encoding="utf-8") as file:
        texts = json.load(file)
    with open(target, "wb") as out:
        for start in range(0, len(texts), 20_000):
            numbers = array.array("I")
            for ids in encode(texts[start : start + 20_000]):
                numbers.append(len(ids))
                numbers.extend(ids)
            numbers.tofile(out)


main()
