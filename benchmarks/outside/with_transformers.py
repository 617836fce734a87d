"""A model folder read by transformers: as its model card does it."""

from typing import Any

from sides import answer_all, load_for_a_cpu


def main() -> None:
    load_for_a_cpu()
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    def answer(model: dict[str, Any]) -> dict[str, Any]:
        network, loaded = AutoModelForImageTextToText.from_pretrained(model["folder"], output_loading_info=True)
        processor = AutoProcessor.from_pretrained(model["folder"])
        inputs = processor(
            text=[model["prompt"]],
            images=[[Image.open(model["image"]).convert("RGB")]],
            add_special_tokens=model["special_tokens"],
            return_tensors="pt",
        )
        tokens = network.generate(**inputs, max_new_tokens=model["words"], do_sample=False)
        text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        missing = sorted(loaded["missing_keys"])
        return {"text": text.strip(), **({"error": f"missing weights: {missing[:3]}"} if missing else {})}

    answer_all(answer, ("transformers", "torch"))


if __name__ == "__main__":
    main()
