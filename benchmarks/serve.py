#!/usr/bin/env python3
"""The server of --serve: images of 16 clients in batches, against one image at a time.

Both sides are the same server with another batch size; the clients post image files to /predict, each the next one when
its answer is there. The answers are compared with predictions of single images. "MB more" is how much more memory the
process has after all rounds than after those that are not counted, in which the C library gathers memory that it keeps.

python benchmarks/serve.py --output benchmarks/results/serve.json
"""

import http.client
import json
import statistics
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import common
import uvicorn
import workload

from vlm.inference import predict_batch
from vlm.service import Served, open_port
from vlm.service.app import create_app
from vlm.service.batcher import Batcher

CLIENTS = 16
CLASSES = 15
REQUESTS = {"full": 200, "quick": 32, "tiny": 20}
DIFFERENT = 16  # image files
WARM_UP = {"full": 3, "quick": 3, "tiny": 100}  # rounds
TOLERANCE = 1e-4  # of a confidence


@contextmanager
def running(served: Served, batch_size: int) -> Iterator[int]:
    """A server on a free port, which is given."""
    with open_port("127.0.0.1", 0) as port, Batcher(served.classify, batch_size) as batcher:
        config = uvicorn.Config(create_app(served, batcher, "127.0.0.1"), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        try:
            yield port.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def post_all(port: int, bodies: list[bytes]) -> list[dict[str, Any]]:
    """The answers to all images, by 16 clients."""

    def post(body: bytes) -> dict[str, Any]:
        client = http.client.HTTPConnection("127.0.0.1", port)
        client.request("POST", "/predict?explain=false", body)
        answer = json.loads(client.getresponse().read())
        client.close()
        return answer

    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(post, bodies))


def main() -> int:
    options = common.start(common.parser(__doc__).parse_args())
    classifier = workload.classifier(options, CLASSES, peaked=True)
    metadata = {"class_names": list(classifier.class_names), "prompts": classifier.prompts.to_json(), "model": "random"}
    served = Served(classifier, metadata, None)
    files = workload.image_files(options, DIFFERENT)
    count = REQUESTS[options.size]
    bodies = [files[i % DIFFERENT].read_bytes() for i in range(count)]
    alone = predict_batch(classifier, classifier.family.processor, files, metadata, 1, False, False)
    expected = [alone[str(file)] for file in files]
    differs = 0.0
    with ExitStack() as stack:
        ports = {size: stack.enter_context(running(served, size)) for size in (1, CLIENTS)}
        for port in ports.values():
            for i, found in enumerate(post_all(port, bodies)):
                wanted = expected[i % DIFFERENT]
                same = found["prediction"] == wanted["prediction"]
                differs = max(differs, abs(found["confidence"] - wanted["confidence"]) if same else 1.0)
        sides = {size: (lambda port=port: post_all(port, bodies)) for size, port in ports.items()}
        common.take_turns(sides, 0, WARM_UP[options.size])
        before = common.resident()["RssAnon"]
        seconds = common.take_turns(sides, options.rounds, 0)
        more = common.resident()["RssAnon"] - before
    row = {
        **common.ratio(seconds[1], seconds[CLIENTS]),
        "clients": CLIENTS,
        "requests": count,
        "images/s, one at a time": count / statistics.median(seconds[1]),
        "images/s, in batches": count / statistics.median(seconds[CLIENTS]),
        "confidence differs": f"{differs:.1e}",
        "MB more": more / common.MIB,
    }
    return common.report(options, [row], differs < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
