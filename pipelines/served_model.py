"""The registered model as MLflow runs it: this file is logged as code, so nothing is unpickled.

`mlflow models serve --env-manager local` answers {"dataframe_records": [{"image": "<base64 of an image file>"}]} with
the mask as base64 of an indexed PNG, its size, and the mean confidence.
"""

from __future__ import annotations

import base64
from typing import Any

import mlflow.pyfunc
from mlflow.models import set_model


class ServedSegmentor(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Loads the artifact `segmentor` and segments one image per row."""

    def load_context(self, context: Any) -> None:
        from repsep_model.checkpoint import load_classes, load_segmentor

        directory = context.artifacts["segmentor"]
        self.model = load_segmentor(directory)
        self.colours = [c["color"] for c in load_classes(directory)["classes"]]

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        # No hints: MLflow would read them as a schema.
        from repsep_model.images import decode_image, encode_mask
        from repsep_model.inference import segment_image

        answers = []
        for data in model_input["image"]:
            found = segment_image(self.model, decode_image(data if isinstance(data, bytes) else base64.b64decode(data)))
            height, width = found.labels.shape
            mask = base64.b64encode(encode_mask(found.labels, self.colours)).decode()
            answers.append(
                {"mask": mask, "height": height, "width": width, "confidence": float(found.confidence.mean())}
            )
        return answers


set_model(ServedSegmentor())
