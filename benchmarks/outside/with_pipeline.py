"""A model folder in the pipeline "image-text-to-text" of transformers, with the prompt as a text."""

from typing import Any

from sides import answer_all, load_for_a_cpu


def main() -> None:
    load_for_a_cpu()
    from PIL import Image
    from transformers import pipeline

    def answer(model: dict[str, Any]) -> dict[str, Any]:
        run = pipeline("image-text-to-text", model=model["folder"], device="cpu")
        (found,) = run(
            text=model["prompt"],
            images=[Image.open(model["image"]).convert("RGB")],
            max_new_tokens=model["words"],
            generate_kwargs={"do_sample": False},
            return_full_text=False,
        )
        return {"text": found["generated_text"].strip()}

    answer_all(answer, ("transformers", "torch"))


if __name__ == "__main__":
    main()
