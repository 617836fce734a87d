"""SmolVLM-Instruct's architecture, with one tile an image and with several."""

import torch
from family_checks import FamilyChecks
from tiny import batch_of, save_tiny_model, tiny_classifier


class TestIdefics3(FamilyChecks):
    def build(self, folder):
        save_tiny_model(folder)

    def one_image(self, batch, i):
        return {name: tensor[i : i + 1].unsqueeze(1) for name, tensor in batch.pixels.items()}


def test_the_encoder_takes_few_images_at_a_time_on_a_cpu_and_gives_the_same(tmp_path, monkeypatch):
    family = (classifier := tiny_classifier(save_tiny_model(tmp_path))).family
    pixels = batch_of(classifier.eval(), [0, 1, 2, 3, 4], with_response=False).pixels
    sizes = []
    family.vision.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    with torch.no_grad():
        whole = family.vision_features(pixels)
        patches = whole.shape[1]
        monkeypatch.setattr("vlm.families.idefics3.PATCHES_AT_ONCE", 2 * patches)
        pieces = family.vision_features(pixels)
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    family.vision_features(pixels)
    assert sizes[-1] == 5, "in one go where a gradient is needed"
