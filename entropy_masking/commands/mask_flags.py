"""The flags that say which tokens are masked and predicted, and the policy that they make."""

from dataclasses import dataclass
from typing import Any, Literal

from entropy_masking.commands.flags import Rule, check_rules, flag, option
from entropy_masking.errors import UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.schema import Manifest

MAX_SEED = (1 << 32) - 1

# defaults of the mask flags that differ from MaskPolicy's, by recipe (docs/RECIPES.md has the measurements)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"warmup": 0.3, "ramp": 0.3},
    # MaskPolicy.paper(); only the ratio may be changed
    "paper": {"ratio": 0.15, "hard_share": 1.0, "temperature": 0.0, "warmup": 0.0, "ramp": 0.0, "by": "entropy"},
}
# field of MaskPolicy → field of MaskOptions
FIELDS = {name: name for name in ("hard_share", "predict_ratio", "predict_by", "corruption")}
FIELDS |= {name: f"mask_{name}" for name in ("ratio", "warmup", "ramp", "temperature", "by", "unit")}


@dataclass(kw_only=True)
class MaskOptions:
    """Which tokens to mask. A field is None if its flag was not given."""

    recipe: Literal["default", "paper"] | None = option(
        "default, or paper: mask the 15 %% with the highest entropies from the start, our reading of arXiv 2605.28526"
    )
    mask_ratio: float | None = option(f"share of the tokens to mask (default: {MaskPolicy.ratio})")
    hard_share: float | None = option(
        f"share of a mask that is chosen by score; the rest is random (default: {MaskPolicy.hard_share})"
    )
    mask_temperature: float | None = option(
        f"τ: sample from softmax(rank/τ); 0 takes the highest scores (default: {MaskPolicy.temperature})"
    )
    mask_by: Literal["entropy", "surprisal"] | None = option(
        "score: entropy of the prediction (default), or surprisal of the token"
    )
    corruption: Literal["bert", "mask-only"] | None = option(
        "bert (default): 80 %% [MASK], 10 %% random, 10 %% kept; or [MASK] only"
    )
    mask_unit: Literal["token", "word"] | None = option("mask token by token (default), or word by word")


@dataclass(kw_only=True)
class TrainingMaskOptions(MaskOptions):
    """Also which of the masked tokens to predict, and how masks change during a run."""

    mask_by: Literal["entropy", "surprisal", "excess"] | None = option(  # type: ignore[assignment]  # one choice more
        "score: entropy of the prediction (default), surprisal of the token, or excess, the student's surprisal minus "
        "that in the shards (only with --entropy-source self)"
    )
    mask_warmup: float | None = option(
        f"share of the run, at its start, with random masks (default: {RECIPES['default']['warmup']})"
    )
    mask_ramp: float | None = option(
        f"share of the run, after the warm-up, in which the hard share rises (default: {RECIPES['default']['ramp']})"
    )
    predict_ratio: float | None = option(
        "share of the tokens to predict, at most --mask-ratio (default: all masked tokens)"
    )
    predict_by: Literal["random", "entropy", "surprisal", "excess"] | None = option(
        "how to choose the predicted tokens among the masked ones (default: random)"
    )


def mask_policy(options: MaskOptions, source: str, seed: int, source_flag: str = "--entropy-source") -> MaskPolicy:
    """The policy that the mask flags name, with scores from ``source``: ``random`` (none), ``parquet`` or ``self``.

    Without ``TrainingMaskOptions`` it has neither warm-up nor ramp. Raises UsageError for flags that are out of range
    or contradict each other.
    """
    given = given_masks(options)
    _check_uses(given, options.recipe, source, source_flag)
    fields = {"hard_share": 0.0} if source == "random" else RECIPES[options.recipe or "default"]
    if not isinstance(options, TrainingMaskOptions) or given.get("hard_share") == 0:
        fields = fields | {"warmup": 0.0, "ramp": 0.0}
    try:
        return MaskPolicy(**fields | given, seed=seed)
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise UsageError(f"{mask_flag(name)} {problem}") from None


def _check_uses(given: dict[str, object], recipe: str | None, source: str, source_flag: str) -> None:
    """Refuse mask flags that contradict others or have no effect with them. Raises UsageError."""
    unscored = f"{{flag}} needs scores, and {source_flag} random has none"
    at_random = "{flag} has no effect with --hard-share 0, which masks at random; leave it out"
    recipes = "{flag} {given} contradicts --recipe paper, which sets {value}; leave one out"
    papers = "{flag} contradicts --recipe paper, which predicts all masked tokens; leave one out"
    excess = "{flag} excess needs the student's own loss; train with --entropy-source self to use it"
    part = "{flag} chooses among the masked tokens; set --predict-ratio below the mask ratio, or leave it out"
    of_scores = ("warmup", "ramp", "temperature", "by")
    ratio = given.get("ratio", RECIPES[recipe or "default"].get("ratio", MaskPolicy.ratio))
    rules: list[Rule] = [
        (source == "random", dict.fromkeys(("hard_share", *of_scores, "recipe")), f"{unscored}; leave it out"),
        (recipe == "paper", {name: value for name, value in RECIPES["paper"].items() if name != "ratio"}, recipes),
        (recipe == "paper", {"predict_ratio": None, "predict_by": None}, papers),
        (source == "random", {"predict_by": "random"}, f"{unscored}; use {source_flag} parquet --hard-share 0"),
        (given.get("by") == "excess" and source != "self", {"by": None}, excess),
        (given.get("predict_ratio", ratio) == ratio, {"predict_by": None}, part),
        (given.get("hard_share") == 0, dict.fromkeys(of_scores), at_random),
    ]
    check_rules(given | {"recipe": recipe}, rules, mask_flag)


def given_masks(options: MaskOptions) -> dict[str, Any]:
    """The mask flags that were given, with the fields of MaskPolicy as keys."""
    given = {name: getattr(options, field, None) for name, field in FIELDS.items()}
    return {name: value for name, value in given.items() if value is not None}


def mask_flag(name: str) -> str:
    """The flag of a field of MaskPolicy."""
    return flag(FIELDS.get(name, name))


def check_scored(policy: MaskPolicy, source: str, manifest: Manifest) -> None:
    """Refuse a policy that needs scores which the shards lack. Raises UsageError."""
    if manifest.scored:
        return
    lacks = f"{manifest.uri} has no scores (it was made with --teacher none); {how_to_score(manifest.uri)}"
    if source == "parquet":
        raise UsageError(lacks)
    for name in ("by", "predict_by"):
        if getattr(policy, name) == "excess":
            raise UsageError(f"{mask_flag(name)} excess needs the surprisal of a reference, but {lacks}")


def how_to_score(uri: str) -> str:
    """How to fix a shard directory that lacks scores."""
    return f"score it with pipeline/score.py --corpus {uri} --teacher MODEL"
