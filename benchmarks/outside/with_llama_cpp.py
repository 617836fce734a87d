"""A model folder through llama.cpp's converter, and what llama.cpp writes with both halves, or with the text half."""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sides import answer_all, said

# The converter knows tokenizers by what they make of a text, and those of small models are not on its list.
CONVERT = """
import sys
sys.argv, known = sys.argv[1:-1], sys.argv[-1]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: known
convert_hf_to_gguf.main()
"""
SPLITS = {"idefics3": "gpt-2", "qwen2_vl": "qwen2"}  # how a text is split before it becomes tokens


def main() -> None:
    source = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["source"]
    (converter,) = Path(source).glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")

    def convert(model: dict[str, Any], *flags: str) -> Path:
        file = Path(model["work"]) / f"model{''.join(flags)}.gguf"
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = json.loads((Path(model["folder"]) / "config.json").read_text(encoding="utf-8"))["model_type"]
        given = [model["folder"], "--outtype", "f32", "--outfile", str(file), *flags, SPLITS.get(kind, "default")]
        command = [sys.executable, "-c", CONVERT, str(converter), *given]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
        print(done.stdout, done.stderr)
        if done.returncode:
            raise RuntimeError(f"the converter says {done.stderr.strip().splitlines()[-1]}")
        return next(file.parent.glob(f"*{file.name}"))  # the image half gets a name with more in front

    def answer(model: dict[str, Any]) -> dict[str, Any]:
        text_half = convert(model)
        try:
            return {"text": write(model, text_half, convert(model, "--mmproj")), "how": "converts"}
        except Exception as error:
            write(model, text_half, None)
            return {"how": f"the text half loads and writes; with the image: {said(error)}"}

    answer_all(answer, ("xllamacpp", "gguf", "transformers", "torch"))


def write(model: dict[str, Any], text_half: Path, image_half: Path | None) -> str:
    """What llama.cpp writes after the prompt, with the image if that half is there."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(text_half)
    settings.n_ctx, settings.n_parallel, settings.warmup = 2048, 1, False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if image_half:
        settings.mmproj.path = str(image_half)
    server = xllamacpp.Server(settings)

    def ask(page: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(values).encode() if values else None
        request = urllib.request.Request(server.listening_address + page, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    before, _, after = model["prompt"].partition(model["image_token"])
    prompt: Any = before + after
    if image_half:
        before, after = (
            text.removeprefix("<|vision_end|>").removesuffix("<|vision_start|>") for text in (before, after)
        )
        data = base64.b64encode(Path(model["image"]).read_bytes()).decode()
        prompt = {"prompt_string": before + ask("/props")["media_marker"] + after, "multimodal_data": [data]}
    asked = {"prompt": prompt, "n_predict": model["words"], "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    return ask("/completion", asked)["content"].strip()


if __name__ == "__main__":
    main()
