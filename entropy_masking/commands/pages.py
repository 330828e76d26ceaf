"""HTML pages that need nothing else: nothing from the network, and no script but their own."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from entropy_masking.commands import figures


def render(template: Path, script: str = "", **values: Any) -> str:
    """A page of a command: its template extends base.html, and may draw with the macros of macros.html.

    Args:
        script: JavaScript of the page; its security policy allows this by hash, and no other.
        values: what the template shows; all text is escaped.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = lambda figure, label: Markup(figures.svg(figure, label))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"light": figures.LIGHT, "dark": figures.DARK, "script": Markup(script), "script_hash": digest}
    return environment.get_template(template.name).render(values)
