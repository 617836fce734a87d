"""SmolVLM-Instruct's architecture, with one tile a picture and with several."""

from family_checks import FamilyChecks
from tiny import save_tiny_model


class TestIdefics3(FamilyChecks):
    def build(self, folder):
        save_tiny_model(folder)

    def one_picture(self, batch, i):
        return {name: tensor[i : i + 1].unsqueeze(1) for name, tensor in batch["pixels"].items()}
