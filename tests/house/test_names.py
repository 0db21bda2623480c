"""Names: one class has one, a function takes at most eight things, and the table of terms is kept."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from known_ways import DOORS, TERMS
from sources import modules

MOST_PARAMETERS = 8

# The terms of the house's table, and British spellings, as words of an identifier, an option or a key.
FORBIDDEN = {
    "acceptance": "likelihood (NLL); the name of the acceptance table only",
    "aside": "reference encoder",
    "bank": "preset codes",
    "beside": "temporary path",
    "carried": "state bundle",
    "coded": "tokenized",
    "grip": "text dependence",
    "guess": "initial posterior",
    "guide": "teacher codec",
    "heard": "transcript, hypothesis or quantized input",
    "judge": "speaker-verification model",
    "judged": "logits, scored",
    "judges": "discriminators",
    "kept": "cache, cached",
    "lies": "location",
    "looks": "intermediate evaluations",
    "manner": "speech options",
    "mend": "fix",
    "mended": "fixed",
    "opinion": "language-model guidance",
    "pace": "admission control, rate",
    "patient": "checkpoint under test",
    "polish": "local search",
    "polished": "local search",
    "reach": "receptive field",
    "said": "transcript or message",
    "scene": "facts",
    "shake": "jitter",
    "strange": "replace",
    "stranger": "interpolated voice",
    "strangers": "interpolated voices",
    "told": "update",
    "trap": "rule",
    "unlikelihood": "LM loss",
    "wake": "resume",
    # British spelling
    "centre": "center",
    "centres": "centers",
    "colour": "color",
    "normalise": "normalize",
    "normalised": "normalized",
    "organisation": "organization",
    "recognise": "recognize",
    "recogniser": "recognizer",
    "recognisers": "recognizers",
    "summarise": "summarize",
    "synthesise": "synthesize",
    "synthesised": "synthesized",
}
# The same for neighboring words, where one alone means other things too.
FORBIDDEN_PAIRS = {
    ("decode", "apart"): "sandboxed decode",
    ("one", "off"): "inline reference",
    ("phone", "reader"): "phone classifier",
    ("preset", "rows"): "preset embeddings",
    ("put", "aside"): "reference encoder",
    ("quick", "encoder"): "student encoder",
    ("soft", "rows"): "soft embedding",
    ("voice", "rows"): "voice embedding",
}


def words_of(identifier: str) -> list[str]:
    """`QuickEncoder`, `quick_encoder` and `--quick-encoder` -> quick, encoder."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def terms_in(identifier: str) -> Iterator[str]:
    if identifier in ("acceptance_table", "acceptance_tables"):  # the one thing that has this name
        return
    words = words_of(identifier)
    yield from (word for word in words if word in FORBIDDEN)
    yield from (" ".join(pair) for pair in pairwise(words) if pair in FORBIDDEN_PAIRS)


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives: of classes, functions, parameters, variables, attributes, keys, options."""
    # Options are keys only where old ones are mapped to new ones.
    old = {key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Dict):
            yield from (key.value for key in node.keys if _is_key(key))
        elif isinstance(node, ast.Subscript) and _is_key(node.slice):
            yield node.slice.value
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif _is_option(node) and node not in old:
            yield node.value


def _is_option(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and bool(re.fullmatch(r"--[a-z][a-z-]+", str(node.value)))


def _is_key(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and bool(re.fullmatch(r"[a-z][a-z0-9_]*", str(node.value)))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def is_command(module: str, function: str) -> bool:
    """Of a command each parameter is an option."""
    return module.startswith(("revox.cli.", "lab.__main__")) and function.endswith("command")


def test_no_two_classes_share_a_name():
    places = defaultdict(list)
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    shared = {name: where for name, where in places.items() if len(where) > 1}
    assert shared == {}


def test_no_function_has_more_than_eight_parameters():
    long = {
        f"{module}.{node.name}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len(parameters(node)) > MOST_PARAMETERS
        and not is_command(module, node.name)
    }
    assert long == DOORS


def test_identifiers_options_and_keys_keep_the_table_of_terms():
    found = defaultdict(set)
    for module, tree in modules().items():
        for name in (*module.split("."), *identifiers(tree)):
            for term in terms_in(name):
                found[module].add(term)
    left = {f"{module}: {term}" for module, terms in found.items() for term in terms}
    assert left == TERMS


def test_words_are_found_in_every_kind_of_identifier():
    tree = ast.parse(
        "class QuickEncoder:\n    def judge(self, opinion):\n        self.kept = {'heard': 1}\n"
        "        x['bank'] = run(guess=2)\nOption('--put-aside')"
    )
    found = sorted(term for name in identifiers(tree) for term in terms_in(name))
    assert found == [
        "aside",
        "bank",
        "guess",
        "heard",
        "judge",
        "kept",
        "opinion",
        "put aside",
        "quick encoder",
    ]
    assert list(terms_in("misheard_banks")) == []  # whole words only
