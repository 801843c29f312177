"""Self-contained pages: a template is filled in, names from outside are escaped, pictures are part of the page.

HTML is escaped in every template. In Markdown, which may hold HTML, names go through the filter `md`, and what stands
between backticks through `code`.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

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
    environment.filters |= {"md": as_text, "code": as_code}
    return environment.get_template(template).render(**values)


def as_text(value: Any) -> str:
    """One line of Markdown that reads as `value` does, in a table too. HTML is left to autoescape."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(str(value).split()))


def as_code(value: Any) -> Markup:
    """What may stand between backticks, or in a block of code, where entities would be shown as they are."""
    return Markup(" ".join(str(value).replace("`", "'").split()))


def data_uri(data: bytes, kind: str) -> str:
    """An encoded picture, `kind` being png or jpeg, as what `src` of an <img> takes."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
