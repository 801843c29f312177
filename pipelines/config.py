"""The recipe: one pydantic model for each stage, YAML in, clear errors out.

Every field has its reason in `description`, which `--help` and error messages use. A key that does not exist is an
error: a misspelt setting that is ignored costs a night of training. What is under `runtime:` says where a stage runs,
not what it computes, and is left out of its fingerprint.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import UsageError
from pipelines.storage import Folder

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """Base of everything in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class PrepareConfig(Section):
    """Folders of image and mask pairs -> a sharded dataset."""

    source: str | None = Field(
        None, description="URI of a folder: images/{split}, masks/{split}, classes.json; by default generated scenes"
    )
    val_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of the groups that becomes val where there are no split folders"
    )
    group_pattern: str | None = Field(
        None,
        description="regular expression on the key whose first group names what must not be split, such as a video",
    )
    layout: Literal["folders", "ade20k", "cityscapes", "pascal_context", "coco_stuff_10k", "coco_stuff_164k"] = Field(
        "folders", description="how the source is laid out: as above, or as a public data set comes, with its label map"
    )
    background: bool = Field(
        False, description="keep the background of pascal_context as a class: 60 instead of 59, where it is ignored"
    )
    max_reject_rate: float = Field(
        0.01, ge=0, le=1, description="the stage fails if a larger share of the pairs is rejected"
    )
    shard_rows: int = Field(512, ge=1, description="images in a shard")
    row_group_rows: int = Field(16, ge=1, description="images in a row group, what a reader reads at once")
    seed: int = Field(0, ge=0, description="of the split and of generated scenes")

    @model_validator(mode="after")
    def _layout_has_what_it_needs(self) -> PrepareConfig:
        if self.layout != "folders" and self.source is None:
            raise ValueError(f"layout={self.layout} needs a source, the folder in which the data set is")
        if self.background and self.layout != "pascal_context":
            raise ValueError(f"background=true belongs to layout=pascal_context, this one is {self.layout}")
        return self


class ModelConfig(Section):
    """What is trained; the fields of repsep_model.SegmentorConfig that a recipe may set."""

    backbone: str = Field("vit_tiny_patch16_224", description="timm model name")
    backbone_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for timm.create_model")
    pretrained: bool | str = Field(
        False, description="false, true (timm's weights by name) or a file of backbone weights"
    )
    width: int | None = Field(None, ge=8, description="channels of our parts")
    stride: Literal[4, 8, 16, 32] = Field(8, description="pixels between the locations of our parts")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the backbone")
    local_pathway: bool = Field(True, description="the second pathway that restores local detail")
    local_discrepancy: bool = Field(True, description="the pathway's discrepancy term")
    uniform_smoothing: bool = Field(False, description="plain neighbourhood means instead of learned ones (a control)")
    separation: Literal["none", "local", "region"] = Field(
        "region", description="how deep representations are separated"
    )
    cross_attention: int = Field(1, ge=0, description="layers of discriminative cross-attention")
    attention_supervision: bool = Field(True, description="losses on the attention and its regions")
    window: int | None = Field(
        None, ge=32, description="side of the sliding window by which images are segmented; by default that of the crop"
    )


class LossConfig(Section):
    """Loss weights; 0 leaves a term out. `make sweep` searches the separation weights."""

    ce: float = Field(1.0, ge=0, description="cross-entropy")
    ohem: float = Field(0.0, ge=0, description="cross-entropy of hard pixels only")
    dice: float = Field(0.0, ge=0, description="soft Dice")
    lovasz: float = Field(0.0, ge=0, description="Lovasz-softmax")
    local: float = Field(0.4, ge=0, description="head of the local pathway")
    coarse: float = Field(0.4, ge=0, description="coarse logits")
    attention: float = Field(0.4, ge=0, description="attention as mask")
    identity: float = Field(0.1, ge=0, description="is a class in the image")
    region: float = Field(0.1, ge=0, description="regions of present classes apart")
    patch: float = Field(0.1, ge=0, description="patches to their class centre")
    classes: tuple[float, ...] | None = Field(None, description="weight of each class in ce")


class AugmentConfig(Section):
    """Training augmentation."""

    crop: int = Field(192, ge=32, description="side of the square crop in pixels")
    scale: tuple[float, float] = Field((0.5, 2.0), description="range of the random scale")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    photometric: float = Field(0.5, ge=0, le=1, description="probability of each colour jitter")
    max_class_share: float = Field(0.75, gt=0, le=1, description="crops with more of one class are drawn again")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AugmentConfig:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale is a range of factors over 0, low then high, got {list(self.scale)}")
        return self


class TrainRuntime(Section):
    """Where training runs."""

    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        2, description="Ray Train workers, one process each; [least, most]: as many as the cluster holds at the time"
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for a worker")
    gpu: bool | None = Field(None, description="one GPU for each worker; by default if the cluster has any")
    max_failures: int = Field(3, ge=-1, description="how often a lost worker group is started again")
    loader_threads: int = Field(2, ge=1, description="threads that decode and augment in each worker")
    log_every: int = Field(20, ge=1, description="steps between logged metrics")
    cache_gib: float = Field(
        20, ge=0, description="local disk for shards of an object store; 0 reads row groups over the network"
    )
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints, besides those that validations leave"
    )
    grad_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time, the same result"
    )

    @model_validator(mode="after")
    def _workers_are_a_range(self) -> TrainRuntime:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers is [least, most], got {list(self.workers)}")  # type: ignore[arg-type]
        return self

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class TrainConfig(Section):
    """Distributed training with Ray Train."""

    dataset: str | None = Field(None, description="URI of a prepared dataset; by default the latest prepare's")
    model: ModelConfig = Field(default_factory=ModelConfig)
    init_from: str | None = Field(
        None, description="start from this model's weights: a directory's URI or models:/name@alias; classes go by name"
    )
    loss: LossConfig = Field(default_factory=LossConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    rare_class_temperature: float | None = Field(
        None,
        gt=0,
        description="show images with rare classes more often, the lower the more so (0.01 is usual); by default off",
    )
    steps: int = Field(400, ge=1, description="optimizer steps")
    batch_size: int = Field(8, ge=1, description="images in a step over all workers")
    micro_batch: int | None = Field(
        None, ge=1, description="images in one forward of a worker; by default all of its share"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    head_lr_scale: float = Field(
        1.0, gt=0, description="our parts learn at lr times this; 10 is usual on pretrained backbones"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the rate from each backbone layer to the one below"
    )
    weight_decay: float = Field(0.05, ge=0, description="of AdamW; norms and biases have none")
    warmup_steps: int = Field(30, ge=0, description="steps of linear warm-up")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the moving average of the weights")
    bf16: bool = Field(True, description="forward passes in bfloat16 autocast")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="each worker holds all of the model, or (FSDP2) a share of weights, average and optimizer"
    )
    compile: bool = Field(False, description="torch.compile the model: minutes at the start, faster steps on a GPU")
    validate_every: int = Field(
        100, ge=1, description="steps between validations (by evaluate's defaults), each with a checkpoint"
    )
    validate_images: int | None = Field(None, ge=1, description="validate on the first so many images only")
    holdout: float = Field(0.0, ge=0, lt=1, description="validate on this share of train instead of val (for sweeps)")
    seed: int = Field(0, ge=0, description="of weights, order, augmentation and drop path")
    runtime: TrainRuntime = Field(default_factory=TrainRuntime)


class SweepRuntime(Section):
    """Where the sweep runs."""

    max_concurrent_trials: int | None = Field(None, ge=1, description="by default what the cluster's resources hold")
    workers_per_trial: int = Field(1, ge=1, description="Ray Train workers in each trial")
    max_failures: int = Field(1, ge=0, description="how often a failed trial is tried again")


class SearchSpace(Section):
    """What is searched: a [low, high] pair is log-uniform, a list is a choice."""

    method: Literal["random", "tpe"] = Field(
        "random", description="random points, known beforehand, or Optuna's TPE, which learns from the trials before"
    )
    loss: dict[str, tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]] = Field(
        default_factory=lambda: {
            "local": (0.1, 1.0),
            "attention": (0.1, 1.0),
            "region": (0.02, 0.5),
            "patch": (0.02, 0.5),
        },
        description="range of each separation-loss weight",
    )
    off: float = Field(
        0.2, ge=0, lt=1, description="probability that a loss weight is 0 instead; tpe only asks if it is over 0"
    )
    backbones: list[ModelConfig] = Field(
        default_factory=lambda: [
            ModelConfig(backbone="vit_tiny_patch16_224", backbone_args={"depth": 4}),
            ModelConfig(backbone="pvt_v2_b0"),
        ],
        min_length=1,
        description="a choice of models",
    )
    separation: list[Literal["none", "local", "region"]] = Field(
        default_factory=list, description="a choice of model.separation; left out, each of the backbones keeps its own"
    )
    cross_attention: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="a choice of model.cross_attention; left out, each keeps its own"
    )
    lr: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (5e-4, 2e-3), description="range of the peak learning rate"
    )

    @model_validator(mode="after")
    def _ranges_are_low_then_high(self) -> SearchSpace:
        ranges = {"lr": self.lr} | {f"loss.{term}": limits for term, limits in self.loss.items()}
        for name, (low, high) in ranges.items():
            if low > high:
                raise ValueError(f"{name} is a range, low then high, got [{low:g}, {high:g}]")
        return self


class SweepConfig(Section):
    """Hyperparameter search with Ray Tune (ASHA) over loss weights and models. What is not searched is `train`'s."""

    dataset: str | None = Field(None, description="URI of a prepared dataset; by default the latest prepare's")
    trials: int = Field(8, ge=1, description="trials in all, the defaults of `train` being the first")
    steps: int = Field(120, ge=1, description="optimizer steps of a full trial")
    validate_every: int = Field(40, ge=1, description="steps between validations, where ASHA may stop a trial")
    reduction_factor: int = Field(2, ge=2, description="ASHA keeps one in so many at each rung")
    holdout: float = Field(0.2, gt=0, lt=1, description="share of train that trials are judged on")
    confirm_seeds: int = Field(3, ge=0, description="fresh seeds with which the best and the default are trained again")
    search: SearchSpace = Field(default_factory=SearchSpace)
    seed: int = Field(0, ge=0, description="of the points that are tried")
    runtime: SweepRuntime = Field(default_factory=SweepRuntime)

    @model_validator(mode="after")
    def _can_be_judged(self) -> SweepConfig:
        if self.validate_every > self.steps:
            raise ValueError(f"validate_every={self.validate_every} is over steps={self.steps}: no trial would report")
        if self.confirm_seeds == 1:
            raise ValueError("confirm_seeds=1 gives no interval to decide by; take 2 or more, or 0 to go without")
        return self


class EvaluateConfig(Section):
    """Per-class results of a model on a dataset's split."""

    model: str | None = Field(
        None, description="directory of a segmentor or models:/name@alias; by default the latest train's"
    )
    predictions: str | None = Field(
        None,
        description="URI of an output of `repsep segment`: its masks are judged and no model runs; what is below "
        "overlays has no effect then",
    )
    dataset: str | None = Field(None, description="URI of a prepared dataset; by default the latest prepare's")
    split: str = Field("val", description="which images the model is judged on")
    overlays: int = Field(6, ge=0, description="images drawn for the report")
    pixel_budget: int | None = Field(
        None,
        ge=1,
        description="images over this many pixels go by windows of train.model.window; by default what is larger than "
        "a window if the backbone is a plain ViT, over 4 megapixels otherwise",
    )
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="sizes of each image whose probabilities are averaged, 1 as it is"
    )
    flip: bool = Field(False, description="average with the mirror images too")
    corruptions: Literal["none", "fast", "full"] = Field(
        "none",
        description="also on corrupted images: 12 times the work, or with full (16 kinds, 5 severities) 80 times",
    )

    @model_validator(mode="after")
    def _judges_one_thing(self) -> EvaluateConfig:
        if self.model is not None and self.predictions is not None:
            raise ValueError(
                "model and predictions are both given, and one evaluation judges one of them: leave one out"
            )
        return self


class RegisterConfig(Section):
    """A version in the MLflow model registry, and the gate before the alias `champion`."""

    name: str = Field(
        "repsep", pattern="^[^/:@'\"]+$", description="name of the registered model, without / : @ and quotes"
    )
    max_class_drop: float = Field(
        0.02, ge=0, description="largest loss of IoU that any class of 1,000 pixels or more may have"
    )
    class_floors: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="the least IoU of classes, by name, without which no model becomes champion"
    )
    min_retention: float | None = Field(
        None, ge=0, description="the least share of the mIoU to be kept on corrupted images; needs evaluate.corruptions"
    )
    bootstrap: int = Field(2000, ge=100, description="resamples of the paired bootstrap over images")


class SegmentRuntime(Section):
    """Where bulk segmentation runs and how work is cut; none of it changes a mask."""

    model_actors: int | None = Field(
        None, ge=1, description="actors that hold the model; by default one for each GPU, without GPUs one for each CPU"
    )
    gpu: bool | None = Field(None, description="a GPU for each model actor; by default if the cluster has any")
    threads: int = Field(8, ge=1, description="requests to the store that a process has under way")


class SegmentConfig(Section):
    """Bulk segmentation: every image under a prefix, or in its shards, becomes a mask and a row."""

    source: str | None = Field(None, description="URI of a prefix of images or shards, or of one of them")
    target: str | None = Field(None, description="URI of the output prefix")
    model: str | None = Field(
        None, description="models:/name@alias, models:/name/version or a directory; by default the registered champion"
    )
    input: Literal["images", "shards"] | None = Field(None, description="by default whichever of the two is there")
    include: tuple[str, ...] = Field(
        (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"), description="extensions that are images"
    )
    shards: tuple[str, ...] = Field(
        (".parquet", ".tar", ".tar.gz", ".tgz"), description="extensions that are shards of images"
    )
    image_column: str = Field("image", description="column of a Parquet shard with the encoded image")
    key_column: str = Field("key", description="column of a Parquet shard that names the image, if it is there")
    confidence: bool = Field(False, description="also write the confidence as 8-bit PNG")
    bf16: bool = Field(True, description="run the model in bfloat16 autocast")
    compile: bool = Field(False, description="torch.compile the model; pays where shapes are few and images many")
    model_batch: int = Field(1, ge=1, description="images of one shape in a call of the model; 8 to 32 suit a GPU")
    pixel_budget: int | None = Field(
        None, ge=1024, description="images over this many pixels go by windows; by default as for evaluate"
    )
    max_pixels: int = Field(
        178_956_970, ge=1024, description="images over this many pixels are refused, as failed rows"
    )
    max_failure_rate: float = Field(0.5, ge=0, le=1, description="stop when a larger share of the images fails")
    overwrite: bool = Field(False, description="replace an output that another model wrote")
    retry_failed: bool = Field(False, description="take failed images again")
    limit: int | None = Field(None, ge=1, description="segment at most this many images (or shards)")
    shard: str | None = Field(
        None, pattern=r"^[1-9][0-9]*/[1-9][0-9]*$", description="i/n: only the i-th of n parts, for n jobs side by side"
    )
    price_per_hour: float | None = Field(None, gt=0, description="what the cluster costs; gives the cost per image")
    runtime: SegmentRuntime = Field(default_factory=SegmentRuntime)


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(
        None, description="tracking URI; by default $MLFLOW_TRACKING_URI, else sqlite in the workspace's home"
    )
    experiment: str = Field("repsep", min_length=1, description="under which runs are listed")


class Recipe(Section):
    """One file for all stages."""

    workspace: str | None = Field(
        None, description="URI under which stages write; by default $REPSEP_HOME/workspace or .repsep/workspace"
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sweep: SweepConfig | None = Field(None, description="left out: the workflow does not sweep")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    segment: SegmentConfig | None = Field(None, description="left out: the workflow ends with register")


def load_recipe(path: str | Path | None, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` settings (values are YAML). Raises UsageError naming the key.

    The path may be a URI; a bare name such as `demo` is one of the recipes that come with the package.
    """
    values: dict[str, Any] = {}
    where = "defaults"
    if path is not None:
        where = str(path)
        if "://" in where:
            folder, _, name = where.rpartition("/")
            values = _parse_yaml(Folder(folder).read(name), where)
        else:
            file = Path(path)
            if not file.is_file() and file.name == where and not file.suffix:
                file = RECIPES / f"{path}.yaml"
                where = str(file)
            values = _parse_yaml(_read_file(file), where)
    for setting in settings:
        _apply(values, setting)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(f"{where}: {line}" for line in _explain(error))) from error


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UsageError(f"there is no recipe {file}; give a path, or one that comes with repsep: {known}") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def _parse_yaml(content: bytes, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{where} must hold sections such as `train:`, it holds a {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], setting: str) -> None:
    name, equals, text = setting.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {setting}: write section.key=value, for example train.steps=200")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {setting}: the value is not valid YAML: {error}") from error
    *parents, last = name.strip().split(".")
    place = values
    for parent in parents:
        inner = place.get(parent)
        place[parent] = inner if isinstance(inner, dict) else {}
        place = place[parent]
    place[last] = value


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: there is no such key{_near(problem['loc'])}")
        elif problem["type"] == "value_error":  # of a validator of ours, which says it all
            lines.append(f"{key}: {problem['ctx']['error']}")
        else:
            lines.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})")
    return lines


def _near(loc: tuple[int | str, ...]) -> str:
    """The closest key that does exist in that section."""
    model: type[BaseModel] | None = Recipe
    for part in loc[:-1]:
        if isinstance(part, int):
            continue  # a place in a list: its elements were found with the list
        names = {(f.alias or n): f for n, f in model.model_fields.items()} if model is not None else {}
        annotation = names[part].annotation if part in names else None
        members = [annotation, *getattr(annotation, "__args__", ())]
        model = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)
    if model is None:
        return ""
    known = [f.alias or n for n, f in model.model_fields.items()]
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
