"""The answers to programs: POST an image to /predict, GET /health."""

import asyncio
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vlm.common import is_out_of_memory, note, one_line, printable
from vlm.inference import NOT_FINITE
from vlm.service.batcher import Batcher, QueueFull
from vlm.service.guard import METHODS, Guard, Route, too_large
from vlm.service.model import Result, Served, Upload

IMAGE_BYTES = 20 * 2**20  # of one uploaded file
READ_SECONDS = 60.0  # in which an image has to arrive
MOST_FIELDS = 16  # of a form; they are not read
MULTIPART_BYTES = 2**16  # around it in a form
ROUTES = (Route("/health"), Route("/predict", IMAGE_BYTES + MULTIPART_BYTES))
GONE = 499  # what logs call the answer to a client that has hung up
SWITCHES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def create_app(
    served: Served, batcher: Batcher[Upload], host: str, routes: Iterable[Route] = (), **guard: Any
) -> FastAPI:
    """The application with /predict and /health.

    Args:
        batcher: classifies; its block has begun.
        host: the address that the server is bound to. routes: further ones, of a page that is mounted.
        guard: further arguments of `Guard`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # the pages of docs come from another site

    async def health(request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            raise HTTPException(405, f"{request.method} is not answered here: GET it.", {"Allow": "GET"})
        about = {"status": "ok", "model": served.name, "base_model": served.base}
        return JSONResponse(about | {"classes": list(served.model.class_names)})

    async def predict(request: Request) -> Response:
        if request.method != "POST":
            raise HTTPException(405, f"{request.method} is not answered here: POST an image.", {"Allow": "POST"})
        try:
            explain = _switch(request, "explain")
            with batcher.admitted():
                async with asyncio.timeout(READ_SECONDS):
                    upload = await _read_upload(request)
                result = await _unless_gone(request, batcher.submit(upload, upload.pixels, explain))
        except QueueFull as full:
            raise HTTPException(503, str(full), headers={"Retry-After": "2"}) from full
        except TimeoutError:
            raise HTTPException(408, f"the image did not arrive within {READ_SECONDS:g} seconds.") from None
        except (ClientDisconnect, asyncio.CancelledError):
            return Response(status_code=GONE)
        if "error" in result:
            raise HTTPException(500 if result["error"] == NOT_FINITE else 400, result["error"])
        return JSONResponse(result)

    app.add_route("/health", health, methods=METHODS)
    app.add_route("/predict", predict, methods=METHODS)
    app.add_exception_handler(HTTPException, _in_words)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Guard, routes=[*ROUTES, *routes], host=host, **guard)
    return app


def _switch(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "true")
    if value.lower() not in SWITCHES:
        raise HTTPException(400, f"{name}={value}: expected true or false.")
    return SWITCHES[value.lower()]


async def _read_upload(request: Request) -> Upload:
    """The image of a request: its whole body, or the one file of a form."""
    kind = request.headers.get("content-type", "").lower()
    if not kind.startswith("multipart/form-data"):
        upload = Upload("the image", await request.body())
    elif "boundary=" not in kind:
        raise HTTPException(400, "the form has no boundary in its content-type: let your program set this header.")
    else:
        upload = await _read_form(request)
    if not upload.data:
        raise HTTPException(400, "there is no image: send the bytes of one, such as with curl --data-binary @cat.jpg")
    if len(upload.data) > IMAGE_BYTES:
        raise HTTPException(413, too_large(IMAGE_BYTES))
    return upload


async def _read_form(request: Request) -> Upload:
    found = "has too many parts, or cannot be read"
    with suppress(HTTPException):  # of Starlette, in its own words
        async with request.form(max_fields=MOST_FIELDS) as form:
            files = [value for _, value in form.multi_items() if not isinstance(value, str)]
            if len(files) == 1:
                return Upload(printable(files[0].filename or "the image"), await files[0].read())
            found = f"has {len(files):,} files" if files else "has no file"
    raise HTTPException(400, f"the form {found}: send one image, such as with curl -F image=@cat.jpg")


async def _unless_gone(request: Request, answer: "Future[Result]") -> Result:
    """Wait for an answer, or until the client hangs up: then nobody needs it.

    Raises:
        ClientDisconnect: it has hung up.
    """
    waiting: asyncio.Future[Any] = asyncio.wrap_future(answer)
    gone: asyncio.Future[Any] = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        gone.cancel()
        waiting.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _in_words(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    note(f"error: {request.url.path}: {type(error).__name__}: {one_line(error)}")
    memory = is_out_of_memory(error)
    words = "the memory of this machine is not enough for this image" if memory else "this failed"
    return JSONResponse({"error": f"{words}: the server's log says more."}, 500)
