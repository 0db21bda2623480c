"""The arms of the recovery experiment, read from committed files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lab.errors import LabError
from revox.training.settings import EncoderTraining, Weights
from revox.training.student import StudentTraining

ARMS = (
    "original", "ceiling", "reconstruction", "published", "published-whisper", "pairs", "pairs-and-human",
    "refined", "student", "student-beam", "distilled", "distilled-again", "inversion", "transposed", "random",
)  # fmt: skip
"""In the order of the tables."""

GOALS_FOR = "pairs-and-human"
"""The arm that the goals are set for, and whose losses are ablated."""

OWN_VERIFIER = "own"
"""In an arm's `verifier`: the small network trained on the speech that restoring may use."""

OF_THE_EXPERIMENT = "of the experiment"
"""In settings: the Whisper or the encoder that the experiment names."""

DISCRIMINATOR_WEIGHTS = {"feature": 2.0}
LIGHT_DISCRIMINATORS = {"n_ffts": [1024, 512, 256], "channels": 8, "every": 2}
SPEAKER_WEIGHT = 3.0  # the published recipe's
AVERAGE = 0.99
OF_THE_STUDENT = (
    "The student encoder has the features and the network of the lab's teacher codec, which defined the "
    "lab's codes."
)
STUDENT_TIME = "The training of its students beforehand is not in its time."
SOFT_WEIGHTS = {"soft_semantic": 1.0, "soft_acoustic": 1.0}
AUGMENTATION = {"gain_db": 6.0, "delay_ms": 2.0, "equalization_db": 2.0, "room": 0.2, "noise": 0.3}
PSEUDO_LABELS = {"pseudo_labels": 2, "pseudo_labeled": 48, "inversion_steps": 80}
_OF_THE_EXPERIMENT = ("steps", "seed", "warmup", "decay_steps", "save_every", "keep", "report_every",
                      "validate_every", "autocast", "whisper", "encoders")  # fmt: skip

_FORBID = ConfigDict(extra="forbid", frozen=True)


class ArmSchedule(BaseModel):
    """A run's schedule in shares of its steps, because the number of steps follows from the time it is given.

    `discriminators` is where they start; None leaves them out.
    """

    model_config = _FORBID

    warmup: float = Field(default=0.02, gt=0, le=1)
    decay: float = Field(default=0.5, gt=0, le=1)
    discriminators: float | None = Field(default=None, ge=0, lt=1)


class StudentArmSettings(BaseModel):
    """A student's training: `sentences` that the model says, as for an encoder's pairs, and the rest."""

    model_config = _FORBID

    sentences: int = Field(default=3200, ge=0)
    interpolated: float = Field(default=0.7, ge=0, le=1)
    training: StudentTraining = Field(default_factory=StudentTraining)
    report_every: int = Field(default=1, ge=1)


class Arm(BaseModel):
    """An arm; `by` is how codes are found.

    "ceiling" is the original encoder on what the decoder makes of its codes. "encoder" trains with `training`
    (entries of `EncoderTraining`) and `schedule`; the encoder of the arm `of`, if one is named, gives soft
    labels too. "student" trains a student with `training` (entries of `StudentTraining`, `sentences` and
    `interpolated`). "transposed" takes the decoder's transposed weights. "refinement" takes `steps` of
    inversion from the codes of the arm `of`; "inversion" takes `steps` from scratch. `beam` paths are
    followed where a clip's words are known. `caveats` say what differs from the title.
    """

    model_config = _FORBID

    name: str = ""
    title: str
    by: Literal[
        "original", "ceiling", "encoder", "student", "transposed", "refinement", "inversion", "random"
    ]
    training: dict[str, Any] = Field(default_factory=dict)
    schedule: ArmSchedule = Field(default_factory=ArmSchedule)
    of: str | None = None
    steps: int | None = Field(default=None, ge=0)
    beam: int = Field(default=0, ge=0)
    caveats: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sensible(self) -> Arm:
        if self.trains != bool(self.training):
            raise ValueError("training belongs to arms by encoder or student, and to them only")
        if (self.by == "refinement") != (self.of is not None) and self.by != "encoder":
            raise ValueError("`of` names the arm that a refinement starts from, or that gives soft labels")
        if (self.by in ("refinement", "inversion")) != (self.steps is not None):
            raise ValueError("steps belong to refinement and inversion")
        for name in _OF_THE_EXPERIMENT:
            if name in self.training:
                raise ValueError(f"training.{name} follows from the time an arm is given: leave it out")
        if "start" in self.training.get("discriminator", {}):
            raise ValueError("training.discriminator.start is schedule.discriminators here")
        if self.by == "encoder":
            self.settings(10, 0)
        if self.by == "student":
            self.student_settings(10, 0)
        return self

    @property
    def trains(self) -> bool:
        """Whether something is trained for it, other than for the arm `of`."""
        return self.by in ("encoder", "student")

    @property
    def needs_whisper(self) -> bool:
        """Whether it distills a Whisper."""
        return self.by == "encoder" and self.settings(10, 0).weights.distillation > 0

    @property
    def kind(self) -> str:
        """The kind of its row in a table."""
        return {"original": "ceiling", "ceiling": "ceiling", "random": "floor"}.get(self.by, "subject")

    @property
    def discriminators_from(self) -> float | None:
        """The share of the steps at which discriminators start to cost time; None if never."""
        if self.by != "encoder":
            return None
        weights = self.settings(10, 0).weights
        counts = weights.feature and weights.reconstruction
        return self.schedule.discriminators if counts and self.training.get("clips", 8) else None

    def settings(self, steps: int, seed: int, **changes: Any) -> EncoderTraining:
        """The settings of a run of `steps` steps."""
        schedule, given = self.schedule, dict(self.training)
        start = schedule.discriminators
        discriminator = {
            **given.get("discriminator", {}),
            "start": steps if start is None else round(start * steps),
        }
        if start is None:
            given["weights"] = {**given.get("weights", {}), "feature": 0.0}
        if given.get("weights", {}).get("distillation"):
            given["whisper"] = OF_THE_EXPERIMENT
        if self.of is not None:
            given["encoders"] = [OF_THE_EXPERIMENT]
        given |= {
            "steps": steps,
            "seed": seed,
            "warmup": max(1, round(schedule.warmup * steps)),
            "decay_steps": max(1, round(schedule.decay * steps)),
            "discriminator": discriminator,
        }
        return EncoderTraining.model_validate(given | changes)

    def student_settings(self, steps: int, seed: int) -> StudentArmSettings:
        """The settings of a student's training of `steps` steps."""
        given = {"training": {}, **self.training}
        given["training"] = {
            **given["training"], "steps": steps, "seed": seed,
            "warmup": max(1, round(self.schedule.warmup * steps)),
        }  # fmt: skip
        return StudentArmSettings.model_validate(given)


def arm_named(name: str) -> Arm:
    """The committed arm of that name. Raises LabError if there is none or it is invalid."""
    file = resources.files("lab") / "recovery" / f"{name}.yaml"
    if not re.fullmatch(r"[a-z][a-z-]*", name) or not file.is_file():
        raise LabError(f"there is no arm {name!r}: the arms are {', '.join(ARMS)}")
    return parse_arm(name, file.read_text(encoding="utf-8"))


def parse_arm(name: str, text: str) -> Arm:
    """An arm from its YAML. Raises LabError naming an invalid entry."""
    try:
        import yaml
    except ImportError:
        raise LabError("the arms need PyYAML: install it with `pip install 'revox[train]'`") from None
    try:
        return Arm.model_validate({**yaml.safe_load(text), "name": name})
    except (yaml.YAMLError, TypeError) as error:
        raise LabError(f"the arm {name} cannot be read: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LabError(f"the arm {name}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def chosen_arms(names: Sequence[str] | None = None) -> list[Arm]:
    """The named arms, by default all, in the order of the tables. Raises LabError for an unknown name."""
    wanted = list(ARMS if names is None else dict.fromkeys(names))
    if not wanted:
        raise LabError(f"no arm is named: the arms are {', '.join(ARMS)}")
    return in_order(arm_named(name) for name in wanted)


def in_order(arms: Iterable[Arm]) -> list[Arm]:
    """Arms in the order of the tables, ablations last."""
    return sorted(arms, key=lambda arm: ARMS.index(arm.name) if arm.name in ARMS else len(ARMS))


def known_arms() -> list[Arm]:
    """Every arm, with the ablations."""
    return [*chosen_arms(), *ablated_arms()]


def ablated_arms() -> list[Arm]:
    """The ablations of the arm that the goals are set for, and the variants of the student."""
    return [*ablations(arm_named(GOALS_FOR)), *student_variants(arm_named("student"))]


def student_variants(base: Arm) -> list[Arm]:
    """`base` with fewer and more sentences, a wider network, or augmentation; the same time."""
    of_training = base.training.get("training", {})
    changes: list[tuple[str, str, dict[str, Any]]] = [
        ("few", "160 sentences", {"sentences": 160}),
        ("some", "1,000 sentences", {"sentences": 1000}),
        ("many", "10,000 sentences", {"sentences": 10_000}),
        ("wide", "twice as wide", {"training": {**of_training, "width": 512}}),
        ("augmented", "with augmentation", {"training": {**of_training, "augmentation": AUGMENTATION}}),
    ]
    return [_changed(base, name, title, **training) for name, title, training in changes]


def ablations(base: Arm) -> list[Arm]:
    """`base` with one loss less, or one more, each; the rest is the same, in the same time.

    A loss that is on is switched off. Of those that are off, the discriminators' is switched on (light ones,
    from half the time on), the speaker's (with the project's own small network), Whisper's distillation, soft
    labels of a student, and matched hidden states. Further ablations: pairs without all-pass augmentation,
    other augmentation, Muon, the decoder's transposed weights or a scaled last layer as a start,
    pseudo-labels found by inversion, and a moving average of the weights.
    """
    settings = base.settings(10, 0)
    weights = settings.weights
    arms = []
    for loss in Weights.model_fields:
        if getattr(weights, loss) > 0:
            arms.append(_changed(base, f"no-{loss}", f"without {loss}", {loss: 0.0}))
    if not weights.feature:
        changed = _changed(
            base,
            "with-discriminators",
            "with light discriminators",
            DISCRIMINATOR_WEIGHTS,
            discriminator=dict(LIGHT_DISCRIMINATORS),
        )
        schedule = base.schedule.model_copy(update={"discriminators": 0.5})
        arms.append(changed.model_copy(update={"schedule": schedule}))
    if settings.pairs and settings.pair.all_pass:
        own = {**base.training.get("pair", {}), "all_pass": 0.0}
        arms.append(_changed(base, "no-all-pass", "without all-pass augmentation", {}, pair=own))
    if not weights.speaker:
        arms.append(
            _changed(
                base, "with-speaker", "with the speaker loss of its own small network",
                {"speaker": SPEAKER_WEIGHT}, verifier=OWN_VERIFIER,
            )
        )  # fmt: skip
    switched_on: list[tuple[str, str, dict[str, float], dict[str, Any]]] = [
        ("with-distillation", "with Whisper distillation", {"distillation": 1.0}, {}),
        ("with-student", "with soft labels of a student", SOFT_WEIGHTS, {"students": 1}),
        ("with-hidden", "with matched hidden states", {"hidden": 0.5}, {}),
        ("with-muon", "with Muon", {}, {"optimizer": "muon"}),
        ("with-transposed", "with the decoder's weights as a start", {}, {"start": "decoder"}),
        ("with-scale", "scaled at the start", {}, {"scaled_start": True}),
        ("with-augmentation", "with augmentation", {}, {"augmentation": AUGMENTATION}),
    ]
    for name, title, changed_weights, training in switched_on:
        one = _changed(base, name, title, changed_weights, **training)
        if name == "with-student":
            one = one.model_copy(update={"caveats": (*base.caveats, OF_THE_STUDENT, STUDENT_TIME)})
        arms.append(one)
    if not settings.average:
        arms.append(
            _changed(base, "with-average", "with a moving average of the weights", {}, average=AVERAGE)
        )
    if settings.clips and not settings.pseudo_labels:
        labeled = _changed(base, "with-pseudo-labels", "with pseudo-labels", {}, **PSEUDO_LABELS)
        arms.append(labeled.model_copy(update={"caveats": (*base.caveats, OF_THE_STUDENT)}))
    return arms


def _changed(
    base: Arm, name: str, title: str, weights: dict[str, float] | None = None, **training: Any
) -> Arm:
    changed = {**base.training, **training}
    if weights is not None:
        changed["weights"] = {**base.training.get("weights", {}), **weights}
    plain = base.model_dump() | {
        "name": f"{base.name}-{name}", "title": f"{base.title}, {title}", "training": changed,
    }  # fmt: skip
    return Arm.model_validate(plain)
