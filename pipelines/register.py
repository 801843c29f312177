"""A model version in the MLflow registry, and the gate before the alias `champion`.

The first model becomes champion with the reason "first". A challenger must be better on the same images: a paired
bootstrap over images whose interval excludes zero, and no class that loses too much. Otherwise it is registered as
`challenger`.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from numpy.typing import NDArray

import repsep_model
from pipelines import tracking
from pipelines.config import EvaluateConfig, Recipe, RegisterConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.evaluate import COUNTS, SEGMENTING, Counts, evaluate, read_counts
from pipelines.models import FetchedModel, fetch_model
from pipelines.stage import Receipt, StageRun, latest_receipt, package_versions, run_stage
from repsep_model.checkpoint import load_classes
from repsep_model.metrics import scores_from_counts

PACKAGES = ("pipelines", "repsep_model")
CHAMPION, CHALLENGER = "champion", "challenger"
LARGE_CLASS_PIXELS = 1000
INTERVAL = (2.5, 97.5)
# No such model, no such alias. Anything else, such as a server that is down, must not crown a model as the first.
NO_CHAMPION = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
SERVED_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes champion, why, and with which figures."""

    promoted: bool
    reason: str
    figures: dict[str, float]


def register(workspace: str, recipe: Recipe) -> Receipt:
    """Run the stage on the latest evaluation."""
    config = recipe.register_
    evaluation = latest_receipt(workspace, "evaluate")
    champion = _champion(recipe, config.name)
    if champion is not None and champion.tags.get("repsep.evaluation") == evaluation.digest:
        # This very evaluation won: say so again, not that it cannot beat itself.
        inherited = champion.tags.get("repsep.replaced", "")
    else:
        inherited = str(champion.version) if champion is not None else ""
    with fetch_model(evaluation.results["model"], recipe.tracking) as model:
        if model.digest != evaluation.results["model_digest"]:
            raise RepsepError(f"{model.uri} has changed since it was evaluated; run `repsep evaluate` again")
        return run_stage(
            "register",
            workspace=workspace,
            config=config,
            inputs={"evaluation": evaluation.digest, "model": model.digest, "champion": inherited},
            packages=PACKAGES,
            again="" if _version_of(recipe, config.name, evaluation) else "the registry has no version of this model",
            lease=True,
            body=lambda run: _register(run, workspace, recipe, evaluation, model, champion),
        )


def compare(ours: Counts, theirs: Counts, class_names: list[str], config: RegisterConfig) -> Decision:
    """The gate: counts of the challenger and of the champion on the same images in the same order."""
    new, old = (scores_from_counts(*(c[n].sum(axis=0) for n in COUNTS)) for c in (ours, theirs))
    difference = new.miou - old.miou
    low, high = paired_bootstrap(ours, theirs, config.bootstrap)
    figures = {"miou": new.miou, "champion_miou": old.miou, "difference": difference, "low": low, "high": high}
    if not low > 0:
        return Decision(
            False,
            f"mIoU {difference:+.4f} against the champion, "
            f"95 % interval [{low:+.4f}, {high:+.4f}] does not exclude zero",
            figures,
        )
    large = ours["labelled"].sum(axis=0) >= LARGE_CLASS_PIXELS
    losses = np.where(large, old.iou - new.iou, -np.inf)
    worst = int(np.nanargmax(losses))
    if losses[worst] > config.max_class_drop:
        return Decision(
            False,
            f"class {class_names[worst]} loses {losses[worst]:.4f} IoU, more than {config.max_class_drop}",
            figures,
        )
    return Decision(
        True, f"mIoU {difference:+.4f} against the champion, 95 % interval [{low:+.4f}, {high:+.4f}]", figures
    )


def paired_bootstrap(ours: Counts, theirs: Counts, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the difference of mIoU when images are drawn again with replacement, the same for both."""
    images = len(ours["labelled"])
    rng = np.random.Generator(np.random.Philox(key=[seed, resamples]))
    draws = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    differences = _resampled_miou(ours, draws) - _resampled_miou(theirs, draws)
    low, high = np.nanpercentile(differences, INTERVAL)
    return float(low), float(high)


def _resampled_miou(counts: Counts, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    intersection, predicted, labelled = (draws @ counts[name] for name in COUNTS)
    union = predicted + labelled - intersection
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(union > 0, intersection / union, np.nan)
    return np.nanmean(iou, axis=1)


def _register(
    run: StageRun, workspace: str, recipe: Recipe, evaluation: Receipt, model: FetchedModel, champion: Any
) -> None:
    config = recipe.register_
    client = tracking.client_for(tracking.tracking_uri(recipe.tracking))
    known = _version_of(recipe, config.name, evaluation)  # of an attempt that ended before its receipt
    if known is not None and champion is not None and known.version == champion.version:
        decision = Decision(True, known.tags["repsep.reason"], {})
    else:
        decision = _decide(workspace, recipe, evaluation, model, champion)
    version, run_id = (str(known.version), known.run_id) if known else _new_version(client, recipe, evaluation, model)
    tags = {
        "repsep.reason": decision.reason,
        "repsep.model_digest": model.digest,
        "repsep.evaluation_uri": evaluation.uri,
        "repsep.dataset_split": evaluation.results["evaluation"],
        "repsep.replaced": _replaced(known, champion),
        "repsep.miou": str(evaluation.results["miou"]),
    }
    for name, value in tags.items():
        client.set_model_version_tag(config.name, version, name, value)
    alias = CHAMPION if decision.promoted else CHALLENGER
    client.set_registered_model_alias(config.name, alias, version)
    run.results = {
        "model": f"models:/{config.name}@{alias}",
        "name": config.name,
        "version": version,
        "alias": alias,
        "reason": decision.reason,
        "figures": {name: round(value, 6) for name, value in decision.figures.items()},
        "mlflow_run": run_id,
    }


def _replaced(known: Any, champion: Any) -> str:
    if known is not None and "repsep.replaced" in known.tags:
        return str(known.tags["repsep.replaced"])
    return str(champion.version) if champion is not None else ""


def _new_version(client: MlflowClient, recipe: Recipe, evaluation: Receipt, model: FetchedModel) -> tuple[str, str]:
    """(version, run id) of the model logged under the run that trained it, or under one of its own."""
    run_id = evaluation.results["mlflow_run"]
    if run_id is None or not tracking.run_exists(recipe.tracking, run_id):
        run_id = tracking.start_run(recipe.tracking, "register", tags={"repsep.stage": "register"})
    with tempfile.TemporaryDirectory() as temporary:
        _save_pyfunc(Path(temporary) / "model", model.directory)
        client.log_artifacts(run_id, str(Path(temporary) / "model"), "model")
    name = recipe.register_.name
    _ensure_registered(client, name)
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    tags = {"repsep.evaluation": evaluation.digest}
    return str(client.create_model_version(name, source, run_id, tags=tags).version), run_id


def _version_of(recipe: Recipe, name: str, evaluation: Receipt) -> Any:
    """The version that was registered for this evaluation, None if there is none."""
    client = tracking.client_for(tracking.tracking_uri(recipe.tracking))
    found = client.search_model_versions(f"name = '{name}'")
    return next((v for v in found if v.tags.get("repsep.evaluation") == evaluation.digest), None)


def _decide(workspace: str, recipe: Recipe, evaluation: Receipt, model: FetchedModel, champion: Any) -> Decision:
    if champion is None:
        return Decision(True, "first", {"miou": evaluation.results["miou"]})
    config = recipe.register_
    uri = f"models:/{config.name}/{champion.version}"
    with fetch_model(uri, recipe.tracking) as current:
        ours, theirs = (load_classes(m.directory)["classes"] for m in (model, current))
        if [c["name"] for c in ours] != [c["name"] for c in theirs]:
            raise UsageError(
                f"the champion {uri} has other classes ({', '.join(c['name'] for c in theirs)}) than this model "
                f"({', '.join(c['name'] for c in ours)}); register it under another name: --set register.name=..."
            )
    # Cached when the champion has been evaluated on these images and in this way before, otherwise done now.
    section = EvaluateConfig(
        model=uri,
        dataset=evaluation.results["dataset"],
        split=evaluation.results["split"],
        overlays=recipe.evaluate.overlays,
        **{name: evaluation.results[name] for name in SEGMENTING},
    )
    theirs_keys, theirs_counts = read_counts(evaluate(workspace, recipe, section))
    ours_keys, ours_counts = read_counts(evaluation)
    if ours_keys != theirs_keys:
        raise UsageError("the champion and this model were evaluated on different images; run `repsep evaluate` again")
    return compare(ours_counts, theirs_counts, [c["name"] for c in ours], config)


def _champion(recipe: Recipe, name: str) -> Any:
    uri = tracking.tracking_uri(recipe.tracking)
    try:
        return tracking.client_for(uri).get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in NO_CHAMPION:
            return None
        raise RepsepError(
            f"MLflow at {tracking.shown(uri)} cannot be used: {tracking.shown(str(error.message))}"
        ) from None


def _ensure_registered(client: MlflowClient, name: str) -> None:
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(
            name, description="RepSep segmentor; the artifact `segmentor` is read by load_segmentor"
        )


def _save_pyfunc(path: Path, directory: Path) -> None:
    versions = package_versions()
    with warnings.catch_warnings():
        # MLflow asks for type hints and an input example, though the signature is given, and lifts any filter itself.
        warnings.simplefilter("ignore", UserWarning)
        warnings.showwarning = lambda *_, **__: None
        _save(path, directory, versions)


def _save(path: Path, directory: Path, versions: dict[str, str]) -> None:
    mlflow.pyfunc.save_model(
        str(path),
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"segmentor": str(directory)},
        code_paths=[str(Path(repsep_model.__file__).parent)],
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, "image")]),
            outputs=Schema(
                [
                    ColSpec(DataType.string, "mask"),
                    ColSpec(DataType.long, "height"),
                    ColSpec(DataType.long, "width"),
                    ColSpec(DataType.double, "confidence"),
                ]
            ),
        ),
        pip_requirements=[f"{name}=={versions[name]}" for name in SERVED_PACKAGES] + ["safetensors", "scipy"],
    )
