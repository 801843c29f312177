"""The registered champion behind `mlflow models serve`, over HTTP: what it answers, and what bad requests get."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipelines.config import Recipe
from pipelines.evaluate import evaluate
from pipelines.models import fetch_model, load_files
from pipelines.prepare import prepare
from pipelines.register import register
from repsep_model.checkpoint import save_segmentor
from repsep_model.images import MAX_PIXELS, decode_image, decode_mask
from repsep_model.inference import segment_image
from repsep_model.segmentor import Segmentor
from tests.bad_images import bomb_png
from tests.model.tiny import VIT, tiny_segmentor
from tests.pipelines.layout import CLASSES, encoded, picture, write_source
from tests.ports import free_ports
from tests.processes import kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.ray]

KINDS = ("PNG", "JPEG", "GIF", "WebP", "BMP", "TIFF")
PHOTOS = [encoded(picture(number, 40 + number, 60), kind) for number, kind in enumerate(KINDS)]
START_S, ANSWER_S = 180, 120


class Service(NamedTuple):
    """A server at work, and the model that it should have."""

    port: int
    model: Segmentor

    def get(self, path: str) -> int:
        return self._asked("GET", path)[0]

    def post(self, body: Any, kind: str = "application/json") -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = self._asked("POST", "/invocations", data, {"Content-Type": kind})
        return status, json.loads(answer) if answer.startswith(b"{") else answer.decode()

    def _asked(self, *request: Any) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request(*request)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A champion in a registry of its own."""
    root = tmp_path_factory.mktemp("serving")
    classes = {"name": "drawn", "ignore_index": 255, "classes": CLASSES}
    save_segmentor(tiny_segmentor(VIT, num_classes=len(CLASSES)), root / "model", classes=classes)
    recipe = Recipe.model_validate(
        {
            "workspace": str(root / "work"),
            "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
            "prepare": {"source": str(write_source(root / "source", ["train/0", "val/0"]))},
            "evaluate": {"model": str(root / "model"), "overlays": 0},
            "register": {"name": "streets"},
        }
    )
    for stage in (lambda w, r: prepare(w, r.prepare), evaluate, register):
        stage(str(recipe.workspace), recipe)
    return recipe


@pytest.fixture(scope="module")
def service(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    (port,) = free_ports(1)
    beside = Path(sys.executable).parent
    command = [str(beside / "mlflow"), "models", "serve", "-m", "models:/streets@champion", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "-p", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": str(recipe.tracking.uri),
        "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",  # it starts uvicorn by name
        "OMP_NUM_THREADS": "1",
    }
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with (elsewhere / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=elsewhere, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        with fetch_model("models:/streets@champion", recipe.tracking) as model:
            found = Service(port, load_files(model.files()))
        deadline = time.monotonic() + START_S
        while not is_up(found):
            assert server.poll() is None, (elsewhere / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (elsewhere / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield found
    finally:
        kill_tree(server.pid)
        server.wait()


def is_up(service: Service) -> bool:
    try:
        return service.get("/ping") == 200
    except OSError:
        return False


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def records(*images: bytes) -> dict[str, Any]:
    return {"dataframe_records": [{"image": text(image)} for image in images]}


TEXTS = [text(photo) for photo in PHOTOS]
FORMS: dict[str, Any] = {
    "dataframe_records": records(*PHOTOS),
    "dataframe_split": {"dataframe_split": {"columns": ["image"], "data": [[t] for t in TEXTS]}},
    "instances": {"instances": [{"image": t} for t in TEXTS]},
    "inputs": {"inputs": {"image": TEXTS}},
    "wrapped lines": {"dataframe_records": [{"image": base64.encodebytes(photo).decode()} for photo in PHOTOS]},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_image_of_a_request_is_answered_with_the_labels_of_the_registered_model(
    form: str, service: Service
) -> None:
    status, answer = service.post(FORMS[form])
    assert status == 200, answer
    assert len(answer["predictions"]) == len(PHOTOS)
    for photo, found in zip(PHOTOS, answer["predictions"], strict=True):
        expected = segment_image(service.model, decode_image(photo))
        assert np.array_equal(decode_mask(base64.b64decode(found["mask"])), expected.labels)
        assert (found["height"], found["width"]) == expected.labels.shape
        assert found["confidence"] == pytest.approx(float(expected.confidence.mean()), abs=1e-5)
        said = {c["id"]: c["pixels"] for c in found["classes"]}
        there, pixels = np.unique(expected.labels, return_counts=True)
        assert said == dict(zip(there.tolist(), pixels.tolist(), strict=True))
        assert list(said.values()) == sorted(said.values(), reverse=True)
        assert [(c["name"], c["color"]) for c in found["classes"]] == [
            (CLASSES[c["id"]]["name"], CLASSES[c["id"]]["color"]) for c in found["classes"]
        ]


BAD: dict[str, tuple[Any, str]] = {
    "not an image": (records(PHOTOS[0], b"hello"), "image 1: not an image that Pillow can read"),
    "cut": (records(PHOTOS[1][:-300]), "image 0: JPEG cannot be decoded"),
    "too large": (records(bomb_png()), f"are over the limit of {MAX_PIXELS}. Send whole image files in base64, of "),
    "empty": (records(b""), "image 0: the object is empty. Send whole image files in base64"),
    "not base64": ({"dataframe_records": [{"image": "!no?"}]}, "Failed to convert column image"),
    "half base64": ({"dataframe_records": [{"image": "abcde"}]}, "Invalid base64-encoded string"),
    "no such column": ({"dataframe_records": [{"photo": TEXTS[0]}]}, "missing inputs ['image']"),
    "a number": ({"dataframe_records": [{"image": 3}]}, "Failed to convert column image"),
    "null": ({"inputs": {"image": [None]}}, ""),
    "no rows": ({"dataframe_records": []}, "missing inputs ['image']"),
    "no form": ({"image": TEXTS[0]}, "'dataframe_records'"),
    "no JSON": (b"{", "valid JSON"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_told_what_is_wrong_and_the_next_one_is_answered(what: str, service: Service) -> None:
    body, reason = BAD[what]
    status, answer = service.post(body)
    assert status == 400, answer
    assert reason in answer["message"]
    assert "stack_trace" not in answer, "an error that nobody foresaw"
    assert service.get("/ping") == 200
    assert service.post(records(PHOTOS[0]))[0] == 200


def test_an_image_that_is_posted_bare_is_told_which_content_types_there_are(service: Service) -> None:
    status, answer = service.post(PHOTOS[0], "image/png")
    assert status == 415
    assert "application/json" in answer
