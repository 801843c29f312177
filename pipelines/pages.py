"""Self-contained HTML pages: a template is filled in, names from outside are escaped, pictures are part of the page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The page. A value that the template asks for and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def data_uri(data: bytes, kind: str) -> str:
    """An encoded picture, `kind` being png or jpeg, as what `src` of an <img> takes."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
