"""Times Hugging Face tokenizers or tiktoken on a JSON list of documents; run by bench/tokenizer.ts.

  tokenizer_peers.py tokenizers tokenizer.json documents.json out rounds
  tokenizer_peers.py tiktoken cl100k_base.tiktoken documents.json out rounds
  tokenizer_peers.py train tokenizer.json documents.json out vocabulary-size

Writes {"seconds": [...]} to out, and ids (uint32) to out.ids or merges (JSON) to out.merges.
"""

import array
import base64
import json
import os
import sys
import time


def encoder(library, source):
    if library == "tokenizers":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(source)
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    import tiktoken
    import tiktoken_ext.openai_public as public

    with open(source) as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file)}
    public.load_tiktoken_bpe = lambda *args, **kwargs: ranks
    arguments = getattr(public, os.path.basename(source).split(".")[0])()
    arguments.pop("explicit_n_vocab", None)
    encoding = tiktoken.Encoding(**arguments)
    return encoding.encode_ordinary


def train(source, documents, out, size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    shell = json.loads(Tokenizer(models.BPE()).to_str())
    with open(source, encoding="utf-8") as file:
        shell["pre_tokenizer"] = json.load(file)["pre_tokenizer"]
    tokenizer = Tokenizer.from_str(json.dumps(shell))
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    start = time.perf_counter()
    tokenizer.train_from_iterator(documents, trainer)
    seconds = time.perf_counter() - start
    with open(out + ".merges", "w", encoding="utf-8") as file:
        json.dump(json.loads(tokenizer.to_str())["model"]["merges"], file, ensure_ascii=False, separators=(",", ":"))
    return [seconds]


def main():
    library, source, documents_path, out, number = sys.argv[1:]
    with open(documents_path, encoding="utf-8") as file:
        documents = json.load(file)
    if library == "train":
        seconds = train(source, documents, out, int(number))
    else:
        encode = encoder(library, source)
        seconds = []
        for _ in range(int(number)):
            start = time.perf_counter()
            results = [encode(document) for document in documents]
            seconds.append(time.perf_counter() - start)
        with open(out + ".ids", "wb") as file:
            for ids in results:
                array.array("I", ids).tofile(file)
    with open(out, "w") as file:
        json.dump({"seconds": seconds}, file)


main()
