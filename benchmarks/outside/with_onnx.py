"""A model folder as ONNX: the whole model by optimum; and the language model by torch, with the image as features."""

from pathlib import Path
from typing import Any

from sides import answer_all, load_for_a_cpu, said

CLOSE = 1e-3  # of a logit


def main() -> None:
    load_for_a_cpu()
    import torch
    from optimum.exporters.onnx import main_export
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    def by_optimum(model: dict[str, Any]) -> str:
        try:
            main_export(
                model["folder"], output=Path(model["work"]) / "optimum", task="image-text-to-text", device="cpu"
            )
        except Exception as error:
            return f"optimum: {said(error)}"
        return "optimum exports"

    def answer(model: dict[str, Any]) -> dict[str, Any]:
        optimum = by_optimum(model)
        network = AutoModelForImageTextToText.from_pretrained(
            model["folder"], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        processor = AutoProcessor.from_pretrained(model["folder"])
        inputs = processor(
            text=[model["prompt"]],
            images=[[Image.open(model["image"]).convert("RGB")]],
            add_special_tokens=model["special_tokens"],
            return_tensors="pt",
        )
        differs = difference(network, dict(inputs), Path(model["work"]))
        same = "the same logits" if differs < CLOSE else "OTHER LOGITS"
        return {"how": f"{optimum}; torch.onnx exports the language model, {same}", "differs": differs}

    answer_all(answer, ("optimum-onnx", "onnxruntime", "transformers", "torch"))


def difference(network: Any, inputs: dict[str, Any], folder: Path) -> float:
    """The largest difference of a logit, if the language model is run by ONNX Runtime."""
    import onnxruntime
    import torch

    language = getattr(network.model, "language_model", None) or network.model.text_model
    given: dict[str, Any] = {}
    hook = language.register_forward_pre_hook(lambda _, args, named: given.update(named), with_kwargs=True)
    with torch.no_grad():
        expected = network(**inputs, use_cache=False).logits
    hook.remove()
    given = {name: value for name, value in given.items() if torch.is_tensor(value)}

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language, self.head = language, network.lm_head

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            named = dict(zip(given, tensors, strict=True))
            return self.head(self.language(**named, use_cache=False).last_hidden_state)

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "logits.onnx"
    torch.onnx.export(Logits().eval(), tuple(given.values()), file, dynamo=True)
    session = onnxruntime.InferenceSession(str(file))
    named = {one.name: value.numpy() for one, value in zip(session.get_inputs(), given.values(), strict=True)}
    (found,) = session.run(None, named)
    return float((torch.from_numpy(found) - expected).abs().max())


if __name__ == "__main__":
    main()
