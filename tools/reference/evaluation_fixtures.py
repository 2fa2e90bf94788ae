"""Writes packages/evaluation/fixtures/harness.json: what lm-evaluation-harness 0.4.13 asks and tells of invented items, with its own definitions of
tasks and a model whose probabilities are known. Needs no weights and no data; modules of other metrics are left out. Run from the repository root:

  pip install --no-deps lm_eval==0.4.13 && pip install jinja2 numpy datasets pydantic scikit-learn pyyaml
  python tools/reference/evaluation_fixtures.py
"""

import importlib
import json
import os
import sys
import tempfile
from unittest.mock import MagicMock

os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp()
import datasets  # noqa: E402, F401

for name in ["evaluate", "sacrebleu", "rouge_score", "sqlitedict", "pytablewriter", "more_itertools", "word2number", "zstandard", "jsonlines", "tenacity"]:
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = MagicMock()

import lm_eval  # noqa: E402
from lm_eval import utils  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

FIXTURE = "packages/evaluation/fixtures/harness.json"
FOLDER = os.path.join(os.path.dirname(lm_eval.__file__), "tasks")
CONTEXT = 400
PREFIX = 94


def log_prob(before, token):
    """Multiples of 1/16: sums are exact. src/harness.test.ts has the same."""
    return -((before * 3 + token * 23) % 61 + 1) / 16


def likeliest(before):
    """The letter or space that is likeliest, the first of equals."""
    return max([32, *range(97, 123)], key=lambda token: log_prob(before, token))


class Known(TemplateLM):
    """A token for each character."""

    backend = "causal"
    max_length = CONTEXT
    asked = []

    @property
    def eot_token_id(self):
        return PREFIX

    def tok_encode(self, string, add_special_tokens=None, **_):
        return [ord(c) for c in string]

    def _loglikelihood_tokens(self, requests, **_):
        told = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(CONTEXT + 1):]
            pairs = list(zip(ids, ids[1:]))[-len(continuation):]
            self.asked.append(["".join(map(chr, ids[: -len(continuation)])), "".join(map(chr, continuation))])
            told.append((sum(log_prob(*pair) for pair in pairs), all(likeliest(a) == b for a, b in pairs)))
        return told

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        windows = lambda text: map(utils.make_disjoint_window, utils.get_rolling_token_windows(self.tok_encode(text), PREFIX, CONTEXT, 1))
        return [sum(ll for ll, _ in self._loglikelihood_tokens([(None, *w) for w in windows(r.args[0])])) for r in requests]

    def generate_until(self, requests, disable_tqdm=False):
        told = []
        for request in requests:
            prompt, kwargs = request.args
            self.asked.append([prompt, ""])
            text = f" {len(prompt)} is what it comes to.\n#### {len(prompt) % 3}\n\nQuestion: and so on"
            for stop in kwargs["until"]:
                text = text.split(stop)[0]
            told.append(text)
        return told


HELLASWAG = [
    {"ind": i, "activity_label": label, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "split": "val", "source_id": "invented", "label": gold, "endings": endings}
    for i, (label, a, b, gold, endings) in enumerate([
        ("Roof shingle removal", "A man is sitting on a roof.", "he", "1", ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof."]),
        ("How to bake bread", "[header] How to bake bread [title] Gather flour. [step] You need a pound  of it.", "", "0", ["[substeps] Sift it. [title] Add water.", "Throw it  away.", "Eat it raw [sic].", "Wait."]),
        ("Été", "  Une Dame entre.", "ELLE Parle à Jean", "2", ["de la pluie.", "du beau temps ☀", "…", "de rien du tout"]),
        ("Clean and jerk", "She lifts.", "then the CAMERA pans", "2", ["up", "down to her feet and stays there", "left", "right"]),
    ])
]
ARC = [
    {"id": f"q{i}", "question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}
    for i, (question, texts, labels, key) in enumerate([
        ("Which is a gas at room temperature?", ["iron", "oxygen", "salt", "granite"], ["A", "B", "C", "D"], "B"),
        ("What do plants need?", ["light", "plastic wrap", "steel"], ["A", "B", "C"], "A"),
        ("Which unit is of force?", ["newton", "joule", "watt", "volt"], ["1", "2", "3", "4"], "1"),
        ("  Why does the moon shine? ", ["it burns", "it reflects the light of the sun", "it is hot", "it is near", "none"], ["A", "B", "C", "D", "E"], "B"),
        ("A {brace} and 'quotes' \"too\"?", ["it's", "\"so\"", "a\\b", "Ω"], ["A", "B", "C", "D"], "D"),
    ])
]
PIQA = [
    {"goal": "To open a jar", "sol1": "hit it with a hammer", "sol2": "turn the lid", "label": 1},
    {"goal": "dry your hands", "sol1": "use a towel", "sol2": "use a towel made of water", "label": 0},
    {"goal": "Öl wechseln ", "sol1": " Öl ablassen", "sol2": "Öl trinken", "label": 0},
]
WINOGRANDE = [
    {"sentence": "The trophy did not fit in the suitcase because the _ was too large.", "option1": "trophy", "option2": "suitcase", "answer": "1"},
    {"sentence": "Sarah was a better surgeon than Maria so _ always got the easier cases.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
    {"sentence": "Ann asked Mary what the time was, because _ had forgotten.", "option1": "Ann", "option2": "Mary", "answer": "1"},
]
LAMBADA = [
    {"text": "he ran and ran until he could see the house and the open door"},
    {"text": "\"where is it?\" she asked. \"under the  bed,\" he said, \"beside the lamp"},
    {"text": "they sat down. nobody could say why frfr"},
    {"text": "x" * 500 + " and then a word"},
]
MMLU = [
    {"question": question, "subject": "abstract_algebra", "choices": choices, "answer": answer}
    for question, choices, answer in [
        (" Find the order of 4 + <2> in Z_12. ", ["2", "3", "4", "12"], 0),
        ("Is Z a field?", ["yes", "no", "only mod 2", "it depends"], 1),
        ("How many groups of order 1 are there?", ["1", "2", "3", "4"], 0),
        ("What is the identity of (Q, *)?", ["0", "1", "-1", "1/2"], 3),
    ]
]
GSM8K = [
    {"question": "Tom has 3 apples and buys 4. How many has he?", "answer": "3 + 4 = <<3+4=7>>7\n#### 2"},
    {"question": "A train takes 2 hours for 100 km. How far does it go in an hour?", "answer": "100 / 2 = 50\n#### 1"},
    {"question": "Six eggs at $2 each?", "answer": "6 * 2 = 12\n#### 0"},
    {"question": "What?", "answer": "#### 1,000"},
]
TEXTS = [{"page": "A short text.\n"}, {"page": " ".join(f"word{i} über" for i in range(120))}, {"page": "no"}]


def definition(path, items, examples, **overrides):
    folder = tempfile.mkdtemp()
    files = {}
    for split, rows in [("test", items), ("train", examples)]:
        files[split] = os.path.join(folder, f"{split}.jsonl")
        with open(files[split], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    config = load_yaml(os.path.join(FOLDER, path)) if path else {}
    config = {**config, **overrides}
    config.pop("tag", None)
    for split in ["validation_split", "dataset_name", "fewshot_split"]:
        config.pop(split, None)
    return {**config, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "training_split": "train", "test_split": "test", "fewshot_split": "train"}


CASES = [
    ("hellaswag", "hellaswag/hellaswag.yaml", HELLASWAG, HELLASWAG[:1], 0, {}),
    ("hellaswag", "hellaswag/hellaswag.yaml", HELLASWAG[1:], HELLASWAG[:1], 1, {}),
    ("arc_easy", "arc/arc_easy.yaml", ARC, ARC[:1], 0, {}),
    ("arc_challenge", "arc/arc_challenge.yaml", ARC[1:], ARC[:1], 1, {}),
    ("piqa", "piqa/piqa.yaml", PIQA, PIQA[:1], 0, {}),
    ("winogrande", "winogrande/default.yaml", WINOGRANDE, WINOGRANDE[:1], 0, {}),
    ("winogrande", "winogrande/default.yaml", WINOGRANDE[1:], WINOGRANDE[:1], 1, {}),
    ("lambada", "lambada/lambada_openai.yaml", LAMBADA, LAMBADA[:1], 0, {}),
    ("mmlu", "mmlu/default/mmlu_abstract_algebra.yaml", MMLU[2:], MMLU[:2], 0, {}),
    ("mmlu", "mmlu/default/mmlu_abstract_algebra.yaml", MMLU[2:], MMLU[:2], 2, {}),
    ("gsm8k", "gsm8k/gsm8k.yaml", GSM8K, GSM8K[:1], 0, {}),
    ("gsm8k", "gsm8k/gsm8k.yaml", GSM8K[1:], GSM8K[:1], 1, {}),
    ("text", None, TEXTS, TEXTS[:1], 0, {
        "task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "page",
        "metric_list": [{"metric": metric} for metric in ["word_perplexity", "byte_perplexity", "bits_per_byte"]],
    }),
]

cases = []
for name, path, items, examples, shots, overrides in CASES:
    lm = Known()
    lm.asked = []
    config = definition(path, items, examples, **overrides)
    result = lm_eval.simple_evaluate(model=lm, tasks=[config], num_fewshot=shots, bootstrap_iters=0 if name == "text" else 100, log_samples=True)
    numbers = next(iter(result["results"].values()))
    metrics = {}
    for key, value in numbers.items():
        metric, _, of = key.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            stderr = numbers.get(f"{metric}_stderr,{of}")
            metrics[metric if of == "none" else key] = [value, stderr if isinstance(stderr, float) else None]
    cases.append({"task": name, "shots": shots, "items": items, "examples": examples, "asked": lm.asked, "metrics": metrics})
    print(name, shots, metrics)

os.makedirs(os.path.dirname(FIXTURE), exist_ok=True)
with open(FIXTURE, "w", encoding="utf-8") as file:
    about = {"written_by": "tools/reference/evaluation_fixtures.py", "lm_eval": importlib.metadata.version("lm_eval"), "context": CONTEXT, "prefix": PREFIX}
    json.dump({**about, "cases": cases}, file, ensure_ascii=True, separators=(",", ":"))
    file.write("\n")
