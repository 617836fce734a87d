"""The step as a GPU or a large model wants it: checkpointed, compiled, and without waiting for a result; played on the
CPU."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import NAMES, batch_of, save_tiny_model, tiny_classifier
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.classifier.objective import Objective
from vlm.config import BOTH, RESPONSE, resolve
from vlm.families import ENCODER_FEATURES, checkpoint_blocks, compile_blocks
from vlm.training.tuning import parameter_groups, prepare_tuning


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def gradients(classifier, loss):
    classifier.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}


def test_checkpointing_keeps_the_inputs_of_the_blocks_alone(folder):
    """Counted: the bytes that autograd keeps for the way back."""
    classifier = tiny_classifier(folder).train()

    def kept():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            classifier(batch_of(classifier, [0, 1, 2]))
        known = {p.data_ptr() for p in classifier.parameters()}
        return sum(size for place, size in sizes.items() if place not in known)

    before = kept()
    checkpoint_blocks(classifier.family)
    assert kept() < 0.6 * before


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients(folder):
    """By a backend that traces and differentiates as the real one does, but needs no compiler."""
    classifier = tiny_classifier(folder).train()
    batch = batch_of(classifier, [0, 5, 6])
    expected = gradients(classifier, classifier(batch).loss)
    compile_blocks(classifier.family, backend="aot_eager")
    found = gradients(classifier, classifier(batch).loss)
    assert all(layer._compiled_call_impl is not None for layer in classifier.family.language.layers)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.slow
def test_every_block_of_a_deep_model_is_compiled(folder, monkeypatch):
    """Each block has a number of its own, and so needs a compilation of its own, of which torch allows eight."""
    classifier = tiny_classifier(folder).train()
    layers = classifier.family.language.layers
    deep = torch.nn.ModuleList(copy.deepcopy(layers[0]) for _ in range(12))
    for number, layer in enumerate(deep):
        layer.self_attn.layer_idx = number
    classifier.family.language.layers = deep
    classifier.model.config.text_config.num_hidden_layers = 12
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_blocks(classifier.family, backend=backend)
    classifier(batch_of(classifier, [0, 5, 6]))
    assert len(compiled) >= 12


class Waits(TorchDispatchMode):
    """Records the operations at which a GPU would have to be waited for: their result, or its size, is needed by the
    program."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.NAMES or any(t is not None and t.dtype == torch.bool for t in indices):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", [RESPONSE, BOTH])
def test_a_training_step_on_cached_features_waits_for_nothing(folder, objective):
    classifier = tiny_classifier(folder)
    classifier.objective = Objective(
        objective, classifier.tree, len(classifier.rendered.opening_ids), class_weights=[1.0] * len(NAMES)
    )
    prepare_tuning(classifier.family, resolve({"tune": "lora"}))
    batch = batch_of(classifier.train(), [0, 5])
    batch = replace(batch, pixels={ENCODER_FEATURES: classifier.family.encoder_features(batch.pixels)})
    optimizer = torch.optim.AdamW(parameter_groups(classifier, 0.01, 1e-3, 1e-3), fused=True)
    with Waits() as waits:
        for first, last in ((True, False), (False, True)):
            found = classifier(batch, first, last)
            (found.loss + (0.0 if found.posterior is None else found.posterior)).backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
    assert waits.found == []
    with Waits() as waits:
        batch.labels.sum().item()
    assert waits.found, "or it would notice nothing"
