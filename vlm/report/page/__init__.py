"""report.html: one file that shows a run to people, without network and scripts. A function of results, data and
predictions alone.

N = test images, C = classes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.common.files import replacing
from vlm.data import Data
from vlm.report.page import sections, top
from vlm.report.page.content import Content, Prediction, shown_images
from vlm.report.page.markup import Markup, element, join

__all__ = ["PAGE", "Prediction", "shown_images", "write_page"]

PAGE = "report.html"
STYLE = Path(__file__).with_name("style.css")
# Nothing may be loaded from elsewhere, whatever a name in the data looks like.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# In the order in which somebody asks: how good, what goes wrong, can it be trusted, how did it come about.
SECTIONS: tuple[tuple[str, str, Callable[[Content], Markup | None]], ...] = (
    ("comparison", "How it compares", sections.comparison),
    ("confusion", "Confusion matrix", sections.confusion),
    ("mistakes", "Most confident mistakes", sections.mistakes),
    ("uncertain", "Least certain images", sections.uncertain),
    ("classes", "Each class", sections.per_class),
    ("metrics", "Metrics", sections.metrics),
    ("reliability", "Reliability", sections.reliability),
    ("curves", "Training", sections.curves),
    ("data", "Data", sections.data),
    ("settings", "Settings", sections.settings),
)


def write_page(path: str | Path, results: dict[str, Any], data: Data, predictions: Sequence[Prediction]) -> None:
    """Write the page, whole or not at all. Its size is bounded, whatever the number of images and classes.

    Args:
        results: what stands in `results.json`. Only `test` must be there; what else is missing is left out.
        data: the images, for thumbnails and counts.
        predictions: one for each image of `data.test`, in its order.
    """
    page = render_page(Content(results, data, predictions))
    with replacing(path) as beside:
        beside.write_bytes(page.encode("utf-8", errors="replace"))  # a file name need not be valid text


def render_page(content: Content) -> str:
    """The page as text."""
    shown = [(name, title, body) for name, title, render in SECTIONS if (body := render(content))]
    links = [element("a", title, href=f"#{name}") for name, title, _ in shown]
    title = top.title(content)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    body = element(
        "body",
        element(
            "header", element("h1", title), element("p", top.subtitle(content), class_="quiet"), top.headline(content)
        ),
        element("nav", *links, aria_label="Sections"),
        element("main", *(element("section", element("h2", title), body, id=name) for name, title, body in shown)),
    )
    return join([Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="en"), "\n"])
