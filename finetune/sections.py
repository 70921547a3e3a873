"""The sections of a recipe: how activations are replaced, on which data, what trains and how, what is compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..interp.errors import OrthoactError

WHAT = ("activations", "activations+norms", "lora", "lora+activations", "bias", "norms", "head", "all")
"""What can train; the head of a classifier trains in each."""

SAME = ("seed", "task", "train.max_steps", "train.batch_size", "train.accumulate", "train.learning_rate")
"""Keys in which the rows of a comparison must not differ; the data neither."""


def one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise OrthoactError(f"{key}: expected one of {', '.join(known)}, got {value!r}")


def _positive(section: Any, prefix: str, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not (value >= 0 if zero else value > 0):
            kind = "number from 0" if zero else "positive number"
            raise OrthoactError(f"{prefix}{name}: expected a {kind}, got {value}")


@dataclass(frozen=True)
class Convert:
    """How the activations are replaced before training; the names are those of `orthoact convert`."""

    family: str = "hermite"
    """See `orthoact families`; `none` trains the model with the activations that it has."""
    degree: int = 8
    """Degree of the core."""
    tails: str = "linear"
    """`linear` or `none`."""
    groups: int | str | None = None
    """Numbers of its own for each of so many groups of channels; `per-channel`."""
    tolerance: float | None = None
    """In place of `degree`: the fewest numbers whose root of J is below this."""
    parameters: int | None = None
    """In place of `degree`: share so many learnable numbers over the sites."""
    derivative_weight: float | None = None
    """Weight of the slope error in J."""
    calibrate: str | None = None
    """Fit each site to its own inputs on this data."""
    include: tuple[str, ...] = ()
    """Only sites whose name matches one of these globs."""
    exclude: tuple[str, ...] = ()
    """Not the sites whose name matches one of these globs."""
    start: str = "fit"
    """`fit`: a copy of what is replaced; `variance-preserving`: the family's start for training from scratch."""

    def __post_init__(self):
        one_of("convert.start", self.start, ("fit", "variance-preserving"))
        _positive(self, "convert.", "degree", "tolerance", "parameters")


@dataclass(frozen=True)
class Data:
    """What is trained and measured on."""

    path: str = "demo"
    """A `datasets` name, a file (.txt, .csv, .json, .jsonl, .parquet), a folder of text, images or one that `datasets`
    reads; `demo`: the text that ships with the demo model."""
    subset: str | None = None
    """The configuration of a `datasets` name."""
    train: str = "train"
    """Name of the split that is trained on; of a `datasets` name slices such as train[:5000] are allowed."""
    validation: str = "validation"
    """Split on which everything is chosen; where there is none, a `holdout` of the training split."""
    test: str = "test"
    """Split that is only measured at the end; where there is none, a `holdout` of the training split."""
    holdout: float = 0.1
    """Share of the training split for each split that is missing: the end of a text, rows drawn by the seed else."""
    eos: bool = False
    """Put the end-of-text token before each row of a causal model's text: rows are documents."""
    text: str = "text"
    """Column of text."""
    label: str = "label"
    """Column of labels: whole numbers or names."""
    image: str = "image"
    """Column of images."""
    length: int = 256
    """Tokens of a window (causal models), or at which a text is cut off."""
    size: int | None = None
    """Pixels of an image's side; default: what the model's own processor says."""
    augment: bool = True
    """Training images are randomly cropped and mirrored; validation and test images never are."""
    train_limit: int | None = None
    """At most so many training windows, texts or images."""
    validation_limit: int | None = None
    """At most so many of the validation split."""
    test_limit: int | None = None
    """At most so many of the test split."""

    def __post_init__(self):
        _positive(self, "data.", "length", "size", "train_limit", "validation_limit", "test_limit")
        if not 0 < self.holdout < 0.5:
            raise OrthoactError(f"data.holdout: expected a share between 0 and 0.5, got {self.holdout}")


@dataclass(frozen=True)
class Train:
    """What trains, and how."""

    what: str = "activations"
    """See `WHAT`."""
    tails: str = "free"
    """`fixed` holds the activations' values and slopes at their joints, and so their tails."""
    loss: str = "task"
    """`task`: the labels'; `distill`: towards the outputs that the original activations give on the same weights."""
    max_steps: int = 200
    """Steps of the optimizer."""
    learning_rate: float = 1e-3
    """Peak rate of everything that has no rate of its own below."""
    activation_learning_rate: float | None = None
    """Peak rate of the activations."""
    head_learning_rate: float | None = None
    """Peak rate of a classifier's head."""
    weight_decay: float = 0.0
    """Of weight matrices; never of activations, norms and biases."""
    batch_size: int = 8
    """Windows, texts or images of a process at a time."""
    evaluation_batch_size: int | None = None
    """The same while measuring; default: `batch_size`."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    warmup: float = 0.0
    """Share of the steps in which the rate rises linearly to its peak."""
    schedule: str = "cosine"
    """How it falls afterwards: `cosine`, `linear` or `constant`."""
    final_rate: float = 0.0
    """Share of the peak rate that is left at the end."""
    beta2: float = 0.999
    """AdamW's second decay."""
    clip: float | None = 1.0
    """Largest norm of a step's gradient."""
    dropout: bool = True
    """Whether the model's dropout is on while training."""
    mixed_precision: str = "no"
    """`no`, `bf16` or `fp16`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    evaluate_every: int | None = None
    """Steps from one measurement on the validation split to the next; default: at the end only."""
    patience: int | None = None
    """Stop after so many measurements without a better one."""
    save_every: int | None = None
    """Steps from one checkpoint to the next; default: every tenth of the run."""
    keep: int = 2
    """Checkpoints that are kept, beside the best one."""
    tracker: str | None = None
    """A tracker of Accelerate: tensorboard, trackio, wandb, ..."""
    lora_rank: int = 8
    """Rank of LoRA's matrices."""
    lora_alpha: int | None = None
    """LoRA's scale; default: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get LoRA; default: PEFT's choice for the architecture, else all."""
    temperature: float = 1.0
    """Of the softmax in `distill`."""
    hidden_weight: float = 0.0
    """Weight in `distill` of the cosine distance between hidden states."""
    swap: str | None = None
    """In `distill`, bring the new activations in little by little: `sites` one after the other, or `blend` all."""
    swap_steps: int | None = None
    """Steps until all are in; default: half of the run."""
    boundary_penalty: float = 0.0
    """Weight of a penalty on inputs outside the cores."""

    def __post_init__(self):
        one_of("train.what", self.what, WHAT)
        one_of("train.tails", self.tails, ("free", "fixed"))
        one_of("train.loss", self.loss, ("task", "distill"))
        one_of("train.schedule", self.schedule, ("cosine", "linear", "constant"))
        one_of("train.mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        if self.swap is not None:
            one_of("train.swap", self.swap, ("sites", "blend"))
        whole = ("max_steps", "batch_size", "evaluation_batch_size", "accumulate", "log_every", "evaluate_every")
        whole += ("patience", "save_every", "keep", "lora_rank", "lora_alpha", "swap_steps")
        rates = ("learning_rate", "activation_learning_rate", "head_learning_rate", "clip", "temperature")
        _positive(self, "train.", *whole, *rates)
        _positive(self, "train.", "weight_decay", "hidden_weight", "boundary_penalty", zero=True)
        for name in ("warmup", "final_rate", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise OrthoactError(f"train.{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        if self.patience is not None and self.evaluate_every is None:
            raise OrthoactError("train.patience: expected train.evaluate_every beside it, it counts measurements")


@dataclass(frozen=True)
class Compare:
    """The table of `--compare`: every row at every rate and seed, the rate chosen on the validation split."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a row -> the keys in which it differs from the recipe."""
    learning_rates: tuple[float, ...] = ()
    """The rates that each row is tried at (`train.learning_rate`); default: the recipe's alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds that each is run with."""

    def __post_init__(self):
        if not self.seeds:
            raise OrthoactError("compare.seeds: expected at least one seed")
        for name, row in self.rows.items():
            for key in row:
                if key in SAME or key.startswith("data."):
                    raise OrthoactError(f"compare.rows.{name}: {key} is the same for all rows, set it in the recipe")
        if any(not rate > 0 for rate in self.learning_rates):
            raise OrthoactError(f"compare.learning_rates: expected positive numbers, got {list(self.learning_rates)}")
