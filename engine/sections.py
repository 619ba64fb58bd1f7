"""The sections of a recipe, as strict models: every key with its type, range, unit and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from hsrgan.engine.sizes import MAX_RESOLUTION, plain

Whole = Annotated[int, Field(ge=1)]
WholeOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(gt=0, description="a number above 0; to train without it set the section to null")]

NOT_EMPTY = "text that is not empty"


class Section(BaseModel):
    """Strict: no unknown key, no conversion but int → float, no infinity. Frozen: nothing changes it during a run."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Where the images come from: exactly one of `shards` and `builtin`."""

    shards: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # what it may say: engine/shard_sources.py
    builtin: Literal["digits"] | None = None        # scikit-learn's digits, packed on first use
    resolution: Annotated[Any, PlainValidator(plain)] = Field(     # what may stand here: engine/sizes.py
        description=f"a side in pixels or [height, width], up to {MAX_RESOLUTION}"
    )
    channels: Literal[1, 3, 4] = 3                  # grey, RGB or RGBA with straight alpha
    mirror: bool = False                            # x-flips, half of the time
    labels: bool = False                            # train conditionally on the manifest's classes
    balanced: bool = False                          # every class equally often, among reals and among fakes' labels
    workers: WholeOrZero = 2                        # loader processes per rank
    window: Whole = 16                              # shards shuffled together
    resampled: bool = False                         # endless random shards instead of epochs
    max_bad: Share = 0.01                           # share of images that may be unusable and replaced; 0 = none
    cache: Annotated[Text, Field(description=NOT_EMPTY)] | None = None  # folder; null = ~/.cache/hsrgan/shards
    cache_gb: Positive = 64.0                       # 10⁹ bytes that fetched shards may take on this machine
    allow_shell: bool = False                       # pipe: and other URLs that run a program


class Generator(Section):
    z_dim: Whole = 512
    w_dim: Whole = 512
    mapping_layers: Whole = 8
    channel_base: Whole = 32768                     # channels at resolution r: min(channel_base / r, channel_max)
    channel_max: Whole = 512
    architecture: Literal["skip", "orig", "resnet"] = "skip"
    num_fp16_res: WholeOrZero                       # top resolutions in half precision, never below 8; ignored in fp32
    conv_clamp: Positive | None                     # bound on activations, in every precision
    mixing_prob: Share = 0.9
    lr: Positive                                    # before the lazy scaling k/(k+1), which the trainer does
    w_avg_beta: Beta = 0.998                        # of the moving average of w, per update


class Discriminator(Section):
    channel_base: Whole = 32768
    channel_max: Whole = 512
    architecture: Literal["resnet", "orig", "skip"] = "resnet"
    num_fp16_res: WholeOrZero
    conv_clamp: Positive | None
    mbstd_group_size: Whole                         # samples per minibatch-std group, at most the micro-batch
    lr: Positive
    mapping_layers: Whole = 8                       # conditional D only


class Freeze(Section):
    """What training leaves as it is; engine/freezing.py."""

    d: WholeOrZero = 0              # Freeze-D: so many layers of D, from the image on
    mapping: bool = False           # G's mapping network
    names: list[Text] = Field(
        [], description="a list of patterns of parameter names, as [G.mapping.fc0.*, 'D.b16.*']"
    )


class Adam(Section):
    """Before the lazy scaling of the betas, which the trainer does."""

    beta1: Beta = 0.0
    beta2: Beta = 0.99
    eps: Positive = 1e-8


class R1(Section):
    gamma: NotNegative
    interval: WholeOrZero = 16      # steps between two penalties, 0 = off

    @property
    def active(self) -> bool:
        return self.gamma > 0 and self.interval > 0


class R2(R1):
    """R1's penalty on fakes. R3GAN (arXiv 2501.05441) adds both to every main step: with intervals of 1, they are steps
    of their own in every iteration, among which D's one Adam shares its rate.
    """

    gamma: NotNegative = 0.0


class Objective(Section):
    loss: Literal["logistic", "hinge", "relativistic"] = "logistic"     # of G and D: losses.ADVERSARIAL


class PathLength(Section):
    weight: NotNegative = 2.0       # 0 = phase off, but the interval still scales G's lr (NVIDIA's cifar)
    interval: WholeOrZero = 4       # steps between two penalties, 0 = off and no scaling
    batch_shrink: Whole = 2         # the phase runs on batch // batch_shrink samples
    decay: Annotated[float, Field(gt=0, le=1)] = 0.01
    parity: bool = False            # gradient through the running mean, as NVIDIA's code has it

    @property
    def active(self) -> bool:
        return self.weight > 0 and self.interval > 0


class Ema(Section):
    kimg: NotNegative               # half-life
    rampup: Positive | None = None  # half-life ≤ rampup · images seen; null = no ramp
    # EDM2's averages beside it (engine/power_ema.py), kept for tools/ema.py in every snapshot: their lengths σ_rel
    power: list[Annotated[float, Field(ge=0.005, le=0.28)]] = Field(
        [], description="a list of lengths from 0.005 to 0.28, as [0.05, 0.10]"
    )


class Hsr(Section):
    """Hierarchical semantic regularisation, arXiv 2208.03764."""

    teacher: Text = Field(description="a .safetensors file of tools/fit_teacher.py or a timm model name")
    weights: Annotated[Text, Field(description=NOT_EMPTY)] | None = None    # file, for a timm name
    layers: dict[int, WholeOrZero] = Field(
        min_length=1, description="a mapping from resolution to teacher layer (0-based), as {8: 11, 16: 8}"
    )
    hidden: Whole = 4096            # channels between the two 1×1 convs of a predictor
    weight: Weight = 1.0            # λ
    weights_per_res: dict[int, NotNegative] | None = None     # λ_r for each resolution of `layers`; null = 1
    distance: Literal["mse", "cosine"] = "mse"
    start_kimg: NotNegative = 0.0   # HSR acts from here on
    ramp_kimg: NotNegative = 0.0    # λ rises linearly over this
    detach: bool = False            # control arm: the heads train, G does not feel it
    parity_normalize: bool = False  # the released code's mixed mean and std


Layers = Annotated[list[WholeOrZero], Field(min_length=1, description="a list of teacher layers (0-based), as [2, 5]")]


class Projected(Section):
    """Discriminators on mixed features of a frozen teacher, beside D (Projected GAN, arXiv 2111.01007)."""

    teacher: Text = Field(description="a .safetensors file of tools/fit_teacher.py or a timm model name")
    weights: Annotated[Text, Field(description=NOT_EMPTY)] | None = None    # file, for a timm name
    layers: Layers                  # one discriminator each; the paper's four have maps of 1/4, 1/8, 1/16, 1/32
    channels: Whole = 64            # of the first layer's random projection; each further layer's has twice as many
    weight: Weight = 1.0            # of their hinge loss beside that of `objective`


class VisionAided(Section):
    """A multi-level discriminator on the features of a frozen teacher, beside D (arXiv 2112.09130)."""

    teacher: Text = Field(description="a .safetensors file of tools/fit_teacher.py or a timm model name")
    weights: Annotated[Text, Field(description=NOT_EMPTY)] | None = None    # file, for a timm name
    layers: Layers                  # the last is averaged over its map; the paper's, of ViT-B: [3, 7, 11]
    hidden: Whole = 256             # channels inside
    weight: Weight = 1.0            # of its logistic loss beside that of `objective`


GROUPS = ("blit", "geom", "color", "filter", "noise", "cutout")     # of ADA's transforms (arXiv 2006.06676)
PIPES = {   # the published names for some of GROUPS
    **{group: (group,) for group in GROUPS},
    **{name: GROUPS[:count] for count, name in enumerate(("bg", "bgc", "bgcf", "bgcfn", "bgcfnc"), start=2)},
}
POLICIES = ("color", "translation", "cutout")   # DiffAugment's
AUGMENT_DEFAULTS: dict[str, dict[str, Any]] = {     # the keys of each mode; the others stay null
    "ada": {"pipe": "bgc", "p": 0.0, "target": 0.6, "kimg": 500.0, "interval": 4},
    "fixed": {"pipe": "bgc", "p": None},
    "diffaugment": {"policy": ",".join(POLICIES)},
}


class Augment(Section):
    """What D sees of reals and fakes: ADA (arXiv 2006.06676) or DiffAugment (arXiv 2006.10738)."""

    mode: Literal["ada", "fixed", "diffaugment"] = "ada"
    pipe: Literal[tuple(PIPES)] | None = None       # ada, fixed: which transforms
    p: Share | None = None                          # probability of each; ada: at the start of the run
    target: Annotated[float, Field(gt=0, lt=1)] | None = None   # ada: mean sign of D's real logits that p aims at
    kimg: Positive | None = None                    # ada: in which p can move from 0 to 1
    interval: Whole | None = None                   # ada: steps between two moves of p
    policy: Text | None = None                      # diffaugment: names of POLICIES with commas between

    @property
    def policies(self) -> list[str]:
        return self.policy.split(",") if self.policy else []


class Metrics(Section):
    """Scores of the averaged G during training. The first of `names` decides which snapshot is the best."""

    names: Text = Field(description="published names, as fid50k_full,pr50k3_full")
    features: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # timm:MODEL:FILE or a teacher; null = own
    attributes: Annotated[Text, Field(description=NOT_EMPTY)] | None = None   # for ls and als: tools/fit_attributes.py


class Faults(Section):
    """What the run does when something fails."""

    nonfinite: Literal["skip", "mend"] = "skip"     # such a step changes nothing, or NaN → 0 and ±inf → ±1e5 in it
    max_nonfinite: Share = 0.1                      # share of a tick's steps; above it the run has diverged
    diverged: Literal["rollback", "stop"] = "rollback"  # to the last checkpoint, once; then stop
    disk_full: Literal["stop", "continue"] = "stop"     # also read-only, over quota, …
    rank_timeout: Annotated[float, Field(ge=1)] = 45.0          # seconds of silence after which a rank is lost
    rendezvous_timeout: Annotated[float, Field(ge=1)] = 300.0   # seconds for all ranks to find each other
