"""The page for people: drop images, see predictions. Made with Gradio, and mounted into the application of app.py."""

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from fastapi import FastAPI
from gradio.data_classes import ListFiles

from vlm.common import message_text, note, one_line, printable
from vlm.data import open_image
from vlm.report import image_address, render
from vlm.service.app import IMAGE_BYTES, MULTIPART_BYTES
from vlm.service.batcher import Batcher, QueueFull
from vlm.service.guard import Route, too_large
from vlm.service.model import Result, Served, Upload

HERE = Path(__file__).parent
MOST_IMAGES = 16  # of one upload
TOP = 5  # classes with a bar
LISTED = 40  # classes that are named at once; more are named when they are asked for
LABEL = f"Up to {MOST_IMAGES} images of at most {IMAGE_BYTES // 2**20} MB each"
# Screen readers read new results out, and browsers offer images first. If Gradio itself were told to take only images,
# or only small ones, it would refuse all that is dropped for one file.
ON_LOAD = """() => {
  document.getElementById('results').setAttribute('aria-live', 'polite')
  const images = document.getElementById('images')
  images.addEventListener('click', () => images.querySelector('input[type=file]').accept = 'image/*', true)
}"""
GONE = "This image is not there any more. Drop it again."
THUMBNAIL = 320  # pixels of the longer side
MOST_COLUMNS = 6  # of examples
UPLOADS_SECONDS = 30, 300  # how often the folder of uploads is looked at, and how old a file may become
UPLOADS_BYTES = 2**30  # of all files in it
EVENTS_WAITING, EVENTS_AT_ONCE = 16, 4


class Refused(gr.Error):
    """What the page shows instead of a result; the log stays free of it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, print_exception=False)


class Dropped(NamedTuple):
    """A file that can be read, and the name that it has for the user."""

    name: str
    path: Path


def give_dropped(place: gr.File) -> None:
    """Let Gradio's place for files give the function of an event what was `Dropped` there.

    A request that names another file of this machine, or an address, instead of an uploaded file is refused. The
    methods are replaced, as Gradio writes a file next to the source of a class that is made from its own. The files
    stay until they are old: those of two clients who send the same image are one file.
    """

    def uploaded(name: str | Path) -> Path:
        path = Path(name).resolve()
        if not path.is_relative_to(Path(place.GRADIO_CACHE).resolve()) or not path.is_file():
            raise Refused(GONE)
        return path

    def preprocess(payload: ListFiles | None) -> list[Dropped]:
        files = [(file.orig_name, uploaded(file.path)) for file in (payload.root if payload else ())]
        return [Dropped(printable(name or path.name), path) for name, path in files]

    def move(name: str | Path | None) -> str | None:
        return str(uploaded(name)) if name else None

    async def async_move(name: str | Path | None) -> str | None:
        return move(name)

    vars(place).update(
        preprocess=preprocess, move_resource_to_block_cache=move, async_move_resource_to_block_cache=async_move
    )


def mount_page(app: FastAPI, served: Served, batcher: Batcher[Upload], examples: Sequence[Path]) -> None:
    """Put the page at / of an application.

    Args:
        examples: image files that can be chosen on the page.
    """
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    gr.mount_gradio_app(
        app,
        make_page(served, batcher, examples),
        path="/",
        theme=theme,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        footer_links=[],
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )


def make_page(served: Served, batcher: Batcher[Upload], examples: Sequence[Path]) -> gr.Blocks:
    """The page, not yet mounted. `gradio_client` finds the function /classify there."""

    def show(dropped: list[Dropped]) -> tuple[str, None]:
        try:
            shown: dict[str, Any] = {"refused": None, "cards": _cards(served, batcher, dropped)}
        except Refused as refused:
            shown = {"refused": refused.message, "cards": []}
        return render("results.html.jinja", HERE, **shown), None

    def show_example(chosen: gr.SelectData) -> str:
        path = examples[int(chosen.index)]
        return show([Dropped(path.name, path)])[0]

    def classify_dropped(images: list[Dropped]) -> list[Result]:
        return classify(batcher, _read(images))

    title = served.task[:1].upper() + served.task[1:]
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=UPLOADS_SECONDS) as page:
        gr.HTML(render("about.html.jinja", HERE, title=title, served=served, listed=LISTED))
        images = gr.File(file_count="multiple", label=LABEL, height=160, elem_id="images")
        results = gr.HTML(elem_id="results")
        if examples:
            gr.HTML("<h2 class='title'>Examples</h2>")
            shown = [(_small(path), path.name) for path in examples]
            columns = min(math.ceil(len(shown) / 2), MOST_COLUMNS)
            options = {
                "allow_preview": False,
                "show_label": False,
                "container": False,
                "buttons": [],
                "columns": columns,
            }
            gallery = gr.Gallery(shown, elem_id="examples", **options)
            gallery.select(show_example, None, results, api_visibility="private")
        give_dropped(images)
        images.upload(show, images, [results, images], api_visibility="private", show_progress_on=results)
        page.load(None, js=ON_LOAD)
        figures = gr.JSON(visible=False)
        asked = gr.Button(visible=False)
        asked.click(classify_dropped, images, figures, api_name="classify")
    page.queue(max_size=EVENTS_WAITING, default_concurrency_limit=EVENTS_AT_ONCE)
    page.has_launched = True  # else Gradio opens any file of this machine that a request names
    return page


def _read(dropped: Sequence[Dropped]) -> list[Upload]:
    """The bytes of some files; of one that is too large as many as show it.

    Raises:
        Refused: there are none, too many, or one that is gone.
    """
    if not dropped:
        raise Refused("There is no image. Drop one or several.")
    if len(dropped) > MOST_IMAGES:
        raise Refused(f"These are {len(dropped)} images. At most {MOST_IMAGES} are classified at a time.")
    try:
        return [Upload(name, _start_of(path)) for name, path in dropped]
    except OSError as error:
        raise Refused(GONE) from error


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(IMAGE_BYTES + 1)


def classify(batcher: Batcher[Upload], uploads: Sequence[Upload]) -> list[Result]:
    """What `predict_batch` returns for each, with its name.

    Raises:
        Refused: there is no place for them.
    """
    try:
        with batcher.admitted(len(uploads)):
            answers = [
                batcher.submit(upload, upload.pixels) if len(upload.data) <= IMAGE_BYTES else None for upload in uploads
            ]
            return [
                {"name": upload.name} | _result(upload.name, answer)
                for upload, answer in zip(uploads, answers, strict=True)
            ]
    except QueueFull as full:
        raise Refused(message_text(str(full))) from full


def _result(name: str, answer: "Future[Result] | None") -> Result:
    """The result of an image that was submitted, or the error of one that was too large for it."""
    if answer is None:
        return {"prediction": None, "error": f"{name}: {too_large(IMAGE_BYTES)}"}
    try:
        return answer.result()
    except Exception as error:
        note(f"error: {type(error).__name__}: {one_line(error)}")
        return {"prediction": None, "error": "This failed: the server's log says more."}


def _cards(served: Served, batcher: Batcher[Upload], dropped: Sequence[Dropped]) -> list[dict[str, Any]]:
    """For each image what the template shows of it."""
    uploads = _read(dropped)
    shown = dict(zip(served.model.class_names, served.classes, strict=True))
    cards = []
    for upload, result in zip(uploads, classify(batcher, uploads), strict=True):
        best = sorted(result.get("probabilities", {}).items(), key=lambda item: -item[1])[:TOP]
        cards.append(
            {
                "result": result,
                "image": None if "error" in result else _as_address(upload),
                "bars": [(shown[name], probability) for name, probability in best],
                "below": served.abstains_below,
            }
        )
    return cards


def _as_address(upload: Upload) -> str:
    """A small copy of an image that stands in the page itself, so that no file of it is kept."""
    return image_address(_small(upload.data), "JPEG", quality=85)


def _small(source: bytes | Path) -> Any:
    image = open_image(source)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def page_routes(uploads: Path) -> list[Route]:
    """What the page and `gradio_client` ask for; Gradio has more routes, such as one that opens any web address.

    Args:
        uploads: the folder of uploads and of copies of the examples, which are under a hash of their content.
    """
    return [
        Route("/(config|theme.css|favicon.ico)?/?"),
        Route("/(assets|static)/.*"),
        Route("/gradio_api/(config|info|startup-events|heartbeat/[^/]*|upload_progress)/?"),
        Route("/gradio_api/(queue/(join|data)|call/(v2/)?classify(/[^/]*)?|cancel|reset)/?"),
        Route(f"/gradio_api/file={re.escape(str(uploads))}/[0-9a-f]+/image.webp"),
        Route("/gradio_api/upload", MOST_IMAGES * (IMAGE_BYTES + MULTIPART_BYTES)),
    ]


def room_in(uploads: Path) -> Callable[[str], str | None]:
    """A function for `Guard`: uploads have to wait if the folder of earlier ones is full."""

    def room_for(path: str) -> str | None:
        if not path.startswith("/gradio_api/upload"):
            return None
        taken = sum(file.stat().st_size for file in uploads.rglob("*") if file.is_file())
        return "too many uploads are waiting: try again in some minutes." if taken > UPLOADS_BYTES else None

    return room_for
