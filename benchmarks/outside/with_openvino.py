"""A model folder exported by optimum-intel, and run by OpenVINO."""

from typing import Any

from sides import answer_all, load_for_a_cpu


def main() -> None:
    load_for_a_cpu()
    from optimum.intel import OVModelForVisualCausalLM
    from PIL import Image
    from transformers import AutoProcessor

    def answer(model: dict[str, Any]) -> dict[str, Any]:
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        network = OVModelForVisualCausalLM.from_pretrained(
            model["folder"], export=True, load_in_8bit=False, ov_config=exact
        )
        processor = AutoProcessor.from_pretrained(model["folder"])
        inputs = processor(
            text=[model["prompt"]],
            images=[[Image.open(model["image"]).convert("RGB")]],
            add_special_tokens=model["special_tokens"],
            return_tensors="pt",
        )
        tokens = network.generate(**inputs, max_new_tokens=model["words"], do_sample=False)
        text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"text": text.strip(), "how": "exports"}

    answer_all(answer, ("optimum-intel", "openvino", "transformers", "torch"))


if __name__ == "__main__":
    main()
