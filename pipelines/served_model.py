"""The registered model as MLflow runs it: this file is logged as code, so nothing is unpickled.

`mlflow models serve -m models:/NAME@champion --env-manager local` answers POST /invocations. Images are whole files
(JPEG, PNG, WebP, TIFF, BMP, GIF) in base64, one or several a request, in any of MLflow's forms:

    {"dataframe_records": [{"image": "..."}]}        {"dataframe_split": {"columns": ["image"], "data": [["..."]]}}
    {"instances": [{"image": "..."}]}                {"inputs": {"image": ["..."]}}

`predictions` has an entry for each image, in order:

    mask          base64 of an indexed PNG of the image's size: class ids, the palette holds the classes' colours
    height, width of the mask, after the photograph's EXIF orientation
    classes       of those in the mask, the commonest first: id, name, color, pixels
    confidence    mean over pixels of the probability of their class

The model runs in float32, on a GPU where there is one; over 4 megapixels by windows. A request with an image that
cannot be taken is refused as a whole with status 400; the message names the image by its place, from 0.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import mlflow.pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE


class ServedSegmentor(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Loads the artifact `segmentor` and segments one image per row."""

    def load_context(self, context: Any) -> None:
        import torch

        from repsep_model.checkpoint import load_classes, load_segmentor

        directory = context.artifacts["segmentor"]
        self.model = load_segmentor(directory).to("cuda" if torch.cuda.is_available() else "cpu")
        self.classes = load_classes(directory)["classes"]

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        # No hints: MLflow would read them as a schema.
        return [self._answer(number, data) for number, data in enumerate(model_input["image"])]

    def _answer(self, number: int, data: Any) -> dict[str, Any]:
        import numpy as np

        from repsep_model.images import MAX_PIXELS, ImageError, decode_image, encode_mask
        from repsep_model.inference import segment_image

        try:
            image = decode_image(file_of(data))
        except ImageError as error:
            raise MlflowException(
                f"image {number}: {error}. Send whole image files in base64, of {MAX_PIXELS:,} pixels at most",
                INVALID_PARAMETER_VALUE,
            ) from error
        found = segment_image(self.model, image)
        height, width = found.labels.shape
        pixels = np.bincount(found.labels.ravel(), minlength=len(self.classes))
        mask = encode_mask(found.labels, [c["color"] for c in self.classes])
        return {
            "mask": base64.b64encode(mask).decode(),
            "height": height,
            "width": width,
            "classes": [
                {name: self.classes[k][name] for name in ("id", "name", "color")} | {"pixels": int(pixels[k])}
                for k in np.argsort(-pixels, kind="stable").tolist()
                if pixels[k]
            ],
            "confidence": float(found.confidence.mean()),
        }


def file_of(data: Any) -> bytes:
    """The image file: of `dataframe_*` MLflow has decoded it, of `inputs` and `instances` it is still base64."""
    raw = data.encode("ascii", "replace") if isinstance(data, str) else bytes(data)
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error:  # no image file has only characters of base64
        return raw


set_model(ServedSegmentor())
