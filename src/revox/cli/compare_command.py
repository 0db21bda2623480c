"""`revox compare`: the same sentences from two sides, and a verdict by a rule written beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revox.cli.marked import say, who_signs
from revox.cli.options import ENVIRONMENT
from revox.cli.progress import show_progress

if TYPE_CHECKING:
    from revox.compare.compare import ComparisonRun
    from revox.compare.figures import SampleScorer
    from revox.compare.samples import ComparedSide
    from revox.marking import Signer

NO_VERDICT = 5
"""The exit code when the rule refuses a verdict, or waits for ratings."""


def command(
    out: Annotated[Path, typer.Option(help="The folder of the comparison: rule, sounds, figures, verdict.")],
    a: Annotated[
        str | None,
        typer.Argument(
            metavar="A",
            help="A folder of sounds, a voice of --checkpoint, or [VOICE@]ENDPOINT as of `revox bench`.",
        ),
    ] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help="The other side, likewise.")] = None,
    rule: Annotated[
        Path | None, typer.Option(help="The rule that decides; stored before the first sample.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Record this side alone into --out, to be A or B of a comparison later."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", "-c", envvar=ENVIRONMENT, help="Where A and B are voices: a folder, or a hub id."
        ),
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Sentences, a line each; else six of revox.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Only so many of the sentences.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A recording of the speaker, for similarity.")
    ] = None,
    recognizer: Annotated[
        str, typer.Option(help="For word errors: none, pocketsphinx, or whisper:FOLDER_OR_HUB_ID.")
    ] = "none",
    grammar: Annotated[Path | None, typer.Option(help="JSGF of the sentences, for pocketsphinx.")] = None,
    naturalness: Annotated[
        bool | None, typer.Option(help="Score naturalness by DistillMOS; else if it is installed.")
    ] = None,
    ratings: Annotated[
        Path | None,
        typer.Option(help="A CSV of the page's blind test, or with rating_a and rating_b; may come later."),
    ] = None,
    key_from: Annotated[
        list[str] | None,
        typer.Option(help="[ENDPOINT=]VARIABLE that holds an endpoint's key, as of `revox bench`."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the comparison in --out, under its rule.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the speech, where an endpoint takes one.")] = 0,
) -> None:
    """Compare A with B by a rule written beforehand, or record a baseline.

    Exit code 5 without a verdict; 1 when a baseline lacks sentences that were not spoken.
    """
    from rich.console import Console

    from revox.bench.plan import TEXTS
    from revox.compare.compare import (
        check_measured,
        compare,
        decide,
        record_baseline,
        report_of,
        store_rule,
        write_result,
    )
    from revox.compare.errors import CompareError
    from revox.compare.rule import parse_rule
    from revox.compare.samples import open_sides, read_sentences
    from revox.evaluation.cache import file_identity
    from revox.speech.files import read_text

    sentences = read_sentences(texts, TEXTS, n)
    scorer = _scorer(reference, recognizer, grammar, naturalness)
    console = Console(stderr=True)
    if baseline is not None:
        if a is not None or rule is not None or ratings is not None or resume:
            raise CompareError(
                "a baseline is recorded alone, into a new folder; leave A, B, --rule, --ratings and --resume "
                "out"
            )
        (side,) = open_sides([baseline], checkpoint, sentences, seed, key_from or ())
        try:
            signer = _signer([side])
            with show_progress(console) as progress:
                samples = record_baseline(side, sentences, scorer, out, progress, signer)
        finally:
            side.close()
        failed = sum(one.file is None for one in samples)
        say(f"{out}: {len(samples)} samples of {side.name}, {failed} without speech")
        if failed:
            raise typer.Exit(1)
        return
    if a is None or b is None or rule is None:
        raise CompareError("a comparison takes A, B and --rule FILE; a baseline --baseline ENDPOINT")
    text = read_text(rule, CompareError)
    parsed = parse_rule(text)
    sides = dict(zip("AB", open_sides([a, b], checkpoint, sentences, seed, key_from or ()), strict=True))
    try:
        check_measured(parsed, sides, scorer, ratings is not None)
        plan = {
            "side A": a, "side B": b, "--checkpoint": checkpoint, "list of sentences": sentences,
            "--seed": seed,
            "--reference": None if reference is None else file_identity(reference),
            "--recognizer": recognizer, "--grammar": None if grammar is None else file_identity(grammar),
            "choice of --naturalness": scorer.naturalness is not None,
        }  # fmt: skip
        signer = _signer(list(sides.values()))
        stored = store_rule(text, out, resume, plan)
        with show_progress(console) as progress:
            found = compare(sides, sentences, stored, scorer, out, progress, signer)
    finally:
        for side in sides.values():
            side.close()
    decide(found, ratings)
    write_result(found, out)
    print(report_of(found))
    _say_verdict(found, out)


def _signer(sides: list[ComparedSide]) -> Signer | None:
    """Who signs what is spoken; None for folders, whose files are taken as they are."""
    from revox.compare.samples import FolderSide

    return None if all(isinstance(side, FolderSide) for side in sides) else who_signs()


def _scorer(
    reference: Path | None, recognizer: str, grammar: Path | None, naturalness: bool | None
) -> SampleScorer:
    from revox.compare.errors import CompareError
    from revox.compare.figures import SampleScorer
    from revox.metrics.intelligibility import load_recognizer
    from revox.metrics.naturalness import NaturalnessModel, can_score_naturalness
    from revox.speech import read_audio
    from revox.speech.files import read_text

    if naturalness is None:
        naturalness = can_score_naturalness()
    words = None if grammar is None else read_text(grammar, CompareError)
    return SampleScorer(
        None if reference is None else read_audio(reference),
        load_recognizer(recognizer, words),
        NaturalnessModel() if naturalness else None,
    )


def _say_verdict(found: ComparisonRun, out: Path) -> None:
    verdict = found.verdict
    if verdict is None:
        say(f"{out}: no verdict yet: the rule asks for ratings; rate, then say --ratings FILE --resume")
    elif verdict.outcome is None:
        say(f"{out}: no verdict: {verdict.reason} ({verdict.clause})")
    else:
        say(f"{out}: {verdict.outcome}, by: {verdict.clause}")
        return
    raise typer.Exit(NO_VERDICT)
