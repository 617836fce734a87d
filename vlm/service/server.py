"""The server: its port, its packages, and its end."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vlm.common import Stopped, UsageError, reason
from vlm.service.guard import EVERYWHERE, LOCAL

if TYPE_CHECKING:
    from vlm.service.model import Served

PACKAGE, OLDEST, NEXT = "gradio", "6.31", "7"  # as requirements-serve.txt; it brings fastapi and uvicorn
INSTALL = f"python -m pip install '{PACKAGE}>={OLDEST},<{NEXT}'"
PATIENCE = 3  # seconds for the answers that are under way when the server is ended


def check_packages() -> None:
    """Look for Gradio, before the model is loaded.

    Raises:
        UsageError: it is not installed, or in another version.
    """
    from importlib import metadata

    from packaging.version import Version

    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UsageError(f"--serve needs the package {PACKAGE}, which is not installed: {INSTALL}") from None
    if not Version(OLDEST) <= Version(found) < Version(NEXT):
        raise UsageError(f"--serve does not work with {PACKAGE} {found}: {INSTALL}")


@contextmanager
def open_port(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Who connects before the model is loaded has to wait for it.

    Raises:
        UsageError: this machine has no such address, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, ValueError):  # ValueError: no name at all
        raise UsageError(_no_address(host)) from None
    with socket.socket(family, kind, protocol) as opened:
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                other = port + 1 if port < 65535 else port - 1
                raise UsageError(f"--port {port} is in use: choose another one, such as --port {other}.") from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(_no_address(host)) from None
            raise UsageError(f"--port {port} cannot be used ({reason(error)}): choose one above 1023.") from None
        yield opened


def _no_address(host: str) -> str:
    return (
        f"--host {host} is no address of this machine: expected 127.0.0.1 (only this machine is answered), 0.0.0.0 "
        "(all networks), or an address of its own."
    )


def serve(
    port: socket.socket, host: str, served: "Served", examples: list[Path], batch_size: int | None = None
) -> None:
    """Answer until Ctrl-C or SIGTERM.

    Args:
        port: from `open_port`.
        host: the address that was asked for.
        examples: image files that can be chosen on the page.
        batch_size: images in one forward pass; default: what fits into the free memory.

    Raises:
        Stopped: it was ended.
    """
    with TemporaryDirectory(prefix="vlm_serve_") as folder:
        uploads = Path(folder).resolve()
        # Read by Gradio when it is imported or makes a page: no figures about the use, no history, its folder.
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_TEMP_DIR": str(uploads),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        import uvicorn

        from vlm.service.app import create_app
        from vlm.service.batcher import Batcher
        from vlm.service.page import mount_page, page_routes, room_in

        with Batcher(served.classify, batch_size or served.batch_size) as batcher:
            app = create_app(served, batcher, host, page_routes(uploads), room_for=room_in(uploads))
            mount_page(app, served, batcher, examples)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=PATIENCE
            )
            server = uvicorn.Server(config)
            _say(host, port.getsockname()[1])
            try:
                server.run(sockets=[port])
            except KeyboardInterrupt as stop:
                raise Stopped(f"stopped after {batcher.answered:,} images.") from stop


def _say(host: str, port: int) -> None:
    from vlm.common import note

    name = f"[{host}]" if ":" in host else host
    shown = "127.0.0.1" if host in EVERYWHERE else name
    note(f"Open http://{shown}:{port} in a browser, or POST images to http://{shown}:{port}/predict. Ctrl-C ends it.")
    if host not in LOCAL:
        note("note: everyone who reaches this machine's port can use the model: there is no password.")
