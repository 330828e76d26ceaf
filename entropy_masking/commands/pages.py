"""HTML pages in one file: nothing comes from the network, and only the page's own script runs."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from entropy_masking.commands import figures


def render(template: Path, script: str = "", **values: object) -> str:
    """A page of a command. Its template extends base.html, and may use the macros of macros.html.

    Args:
        script: JavaScript of the page, the only one that its security policy allows.
        values: variables of the template; all text is escaped.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = lambda figure, label: Markup(figures.svg(figure, label))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"light": figures.LIGHT, "dark": figures.DARK, "script": Markup(script), "script_hash": digest}
    return environment.get_template(template.name).render(values)
