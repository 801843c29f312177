"""A model version in the MLflow registry, and the gate before the alias `champion`.

The first model becomes champion with the reason "first". A later one must pass the gate (`gate.py`); otherwise it is
registered as `challenger`, with the reason and the figures as tags and the decision as a page.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Object, Property

import repsep_model
from pipelines import tracking
from pipelines.config import EvaluateConfig, Recipe
from pipelines.dataset import open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.evaluate import evaluate, read_counts
from pipelines.evaluation.measures import SEGMENTING
from pipelines.gate import Decision, absolute_checks, compare, first, gate_page
from pipelines.models import FetchedModel, fetch_model
from pipelines.stage import Receipt, StageRun, latest_receipt, package_versions, run_stage
from repsep_model.checkpoint import load_classes

PACKAGES = ("pipelines", "repsep_model")
CHAMPION, CHALLENGER = "champion", "challenger"
GATE_PAGE = "gate.html"
# No such model, no such alias. Anything else, such as a server that is down, must not crown a model as the first.
NO_CHAMPION = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
SERVED_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")
SERVED_CLASSES = Array(
    Object(
        [
            Property("id", DataType.long),
            Property("name", DataType.string),
            Property("color", Array(DataType.long)),
            Property("pixels", DataType.long),
        ]
    )
)


def register(workspace: str, recipe: Recipe) -> Receipt:
    """Run the stage on the latest evaluation."""
    config = recipe.register_
    evaluation = latest_receipt(workspace, "evaluate")
    if evaluation.results.get("predictions") is not None:
        raise UsageError(
            f"the latest evaluation judged the masks {evaluation.results['predictions']} and no model; run "
            "`repsep evaluate` without evaluate.predictions, then register"
        )
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


def _register(
    run: StageRun, workspace: str, recipe: Recipe, evaluation: Receipt, model: FetchedModel, champion: Any
) -> None:
    config = recipe.register_
    client = tracking.client_for(tracking.tracking_uri(recipe.tracking))
    known = _version_of(recipe, config.name, evaluation)  # of an attempt that ended before its receipt
    if known is not None and champion is not None and known.version == champion.version:
        decision = Decision(True, known.tags["repsep.reason"], {"miou": evaluation.results["miou"]})
    else:
        decision = _decide(workspace, recipe, evaluation, model, champion)
    version, run_id = (str(known.version), known.run_id) if known else _new_version(client, recipe, evaluation, model)
    tags = {
        "repsep.reason": decision.reason,
        tracking.DIGEST_TAG: model.digest,
        "repsep.evaluation_uri": evaluation.uri,
        "repsep.dataset_split": evaluation.results["evaluation"],
        "repsep.replaced": _replaced(known, champion),
        "repsep.miou": str(evaluation.results["miou"]),
    } | {f"repsep.gate.{name}": f"{value:.6f}" for name, value in decision.figures.items()}
    for name, value in tags.items():
        client.set_model_version_tag(config.name, version, name, value)
    page = gate_page(
        decision,
        model=f"{config.name} version {version}",
        champion=f"{config.name} version {tags['repsep.replaced']}" if decision.classes else None,
        evaluation=evaluation.results,
    )
    run.folder.write(GATE_PAGE, page.encode())
    run.outputs = [GATE_PAGE]
    client.log_text(run_id, page, f"gate/{config.name}-{version}.html")
    alias = CHAMPION if decision.promoted else CHALLENGER
    client.set_registered_model_alias(config.name, alias, version)
    run.results = {
        "model": f"models:/{config.name}@{alias}",
        "name": config.name,
        "version": version,
        "alias": alias,
        "reason": decision.reason,
        "figures": {name: round(value, 6) for name, value in decision.figures.items()},
        "checks": [asdict(check) for check in decision.checks],
        "classes": decision.classes,
        "champion": tags["repsep.replaced"] if decision.classes else None,
        "page": run.folder.uri_of(GATE_PAGE),
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
    config = recipe.register_
    if champion is None:
        return first(evaluation.results, config)
    others = absolute_checks(evaluation.results, config)
    uri = f"models:/{config.name}/{champion.version}"
    with fetch_model(uri, recipe.tracking) as current:
        ours, theirs = (load_classes(m.directory)["classes"] for m in (model, current))
        if [c["name"] for c in ours] != [c["name"] for c in theirs]:
            raise UsageError(
                f"the champion {uri} has other classes ({', '.join(c['name'] for c in theirs)}) than this model "
                f"({', '.join(c['name'] for c in ours)}); register it under another name: --set register.name=..."
            )
    dataset, split = evaluation.results["dataset"], evaluation.results["split"]
    if open_dataset(dataset).split_digest(split) != evaluation.results["evaluation"]:
        raise UsageError(
            f"the split {split} of {dataset} has changed since this model was evaluated on it: the champion cannot be "
            "judged on the same images. Run `repsep evaluate` again"
        )
    # Cached when the champion has been evaluated on these images and in this way before, otherwise done now.
    section = EvaluateConfig(
        model=uri,
        dataset=dataset,
        split=split,
        overlays=recipe.evaluate.overlays,
        **{name: evaluation.results[name] for name in (*SEGMENTING, "corruptions")},
    )
    theirs_keys, theirs_counts = read_counts(evaluate(workspace, recipe, section))
    ours_keys, ours_counts = read_counts(evaluation)
    if ours_keys != theirs_keys:
        raise UsageError("the champion and this model were evaluated on different images; run `repsep evaluate` again")
    return compare(ours_counts, theirs_counts, [c["name"] for c in ours], config, others)


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
                    ColSpec(SERVED_CLASSES, "classes"),
                    ColSpec(DataType.double, "confidence"),
                ]
            ),
        ),
        pip_requirements=[f"{name}=={versions[name]}" for name in SERVED_PACKAGES] + ["safetensors", "scipy"],
    )
