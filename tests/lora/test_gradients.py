"""Hooks on the layers give the gradients that autograd gives of the base weights, and nothing else changes."""

import copy
import gc
import pickle
import weakref

import models
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from curvopt.lora import find_lora_pairs
from curvopt.lora.gradients import (
    BaseGradients,
    base_layer,
    base_weight,
    columns_of,
    draw_rows,
    gathered,
    layer_gradient,
    layer_shape,
    output_rows,
    projected,
    rows_of,
    write_columns,
)

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "Conv1D": lambda: Conv1D(5, 6),
    "square Conv1D": lambda: Conv1D(6, 6),
    "conv1d": lambda: nn.Conv1d(3, 5, 3, padding="same"),
    "dilated": lambda: nn.Conv1d(3, 5, 3, padding="same", dilation=2),
    "conv2d": lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1),
    "reflecting": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(9, 5),
    "padded embedding": lambda: nn.Embedding(9, 5, padding_idx=2),
}


def inputs(kind, i=0):
    g = torch.Generator().manual_seed(i)
    if "embedding" in kind:
        return torch.randint(9, (4, 6), generator=g)
    shape = {
        "conv1d": (2, 3, 9),
        "dilated": (2, 3, 9),
        "conv2d": (2, 3, 7, 6),
        "reflecting": (2, 3, 5, 5),
        "conv3d": (2, 2, 4, 4, 4),
    }
    return torch.randn(shape.get(kind, (2, 4, 6)), generator=g, dtype=torch.float64)


class One(nn.Module):
    """One layer with a PEFT adapter, B = 0 (or A, in an embedding)."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer = LAYERS[kind]()
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["layer"]), self)
        self.double()

    def forward(self, x):
        return torch.tanh(self.layer(x))


OWN = ("dilated", "reflecting")  # where PEFT's A convolves otherwise than the base


@pytest.mark.parametrize("kind", LAYERS)
def test_the_sum_is_the_gradient_of_the_base_weight(kind):
    model = One(kind)
    (pair,) = find_lora_pairs(model)
    gradients = BaseGradients([pair])
    gradients.attach()
    base = model.layer.get_base_layer()
    assert base_layer(pair) is base
    base.weight.requires_grad_()
    for i in range(3):
        model(inputs(kind, i)).square().mean().backward()
        gradients.commit()
    W, G = base.weight, base.weight.grad
    if "Conv1D" in kind or "embedding" in kind:
        W, G = W.T, G.T
    found = gradients.sums[pair]["gradient"]
    assert found.dtype == torch.float64 and gradients.seen[pair] == 3
    if kind in OWN:
        assert not torch.allclose(found, G.flatten(1), rtol=1e-2)
    else:
        torch.testing.assert_close(found, G.flatten(1), rtol=1e-10, atol=1e-14)  # float64, other order of summation
    assert torch.equal(base_weight(pair), W.detach().flatten(1))
    assert layer_shape(pair) == (found.shape[1], found.shape[0])
    gradients.remove()
    assert models.hooks(model) == 0


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "padded" not in kind])
def test_the_gradient_of_B_is_the_compressed_sum(kind):
    """∂L/∂B = s Ḡ Aᵀ while B is zero; `rows_of` and `columns_of` put the tensors the right way round."""
    model = One(kind)
    (pair,) = find_lora_pairs(model)
    if not pair.A.any():
        draw_rows(pair, torch.Generator().manual_seed(1))
        nn.init.zeros_(pair.B)
    gradients = BaseGradients([pair])
    gradients.attach()
    model(inputs(kind)).square().mean().backward()
    gradients.commit()
    compressed = pair.scaling * gradients.sums[pair]["gradient"] @ rows_of(pair).T
    torch.testing.assert_close(columns_of(pair, pair.B.grad), compressed, rtol=1e-10, atol=1e-14)
    write_columns(pair, compressed)
    assert torch.equal(columns_of(pair), compressed) and torch.equal(pair.B, pair.B.grad.new_tensor(pair.B.tolist()))


class Plain(nn.Module):
    """loralib's way: the layer is the base."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6, dtype=torch.float64), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
        self.lora_B = nn.Parameter(torch.zeros(5, 2, dtype=torch.float64))

    def forward(self, x):
        return x @ (self.weight + self.lora_B @ self.lora_A).T


class Turned(Plain):
    """The factors stored the other way round."""

    def __init__(self):
        super().__init__()
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().T.contiguous()) for p in (self.lora_A, self.lora_B))

    def forward(self, x):
        return x @ (self.weight.T + self.lora_A @ self.lora_B)


@pytest.mark.parametrize("make", [Plain, Turned, lambda: models.LoraLinear(6, 5, 2).double()])
def test_layers_of_other_libraries(make):
    torch.manual_seed(0)
    layer = make()
    (pair,) = find_lora_pairs(layer)
    nn.init.zeros_(pair.B)
    gradients = BaseGradients([pair])
    gradients.attach()
    weight = base_layer(pair).weight.requires_grad_()
    torch.tanh(layer(inputs("linear"))).square().mean().backward()
    gradients.commit()
    torch.testing.assert_close(gradients.sums[pair]["gradient"], weight.grad, rtol=1e-10, atol=1e-14)
    compressed = pair.scaling * gradients.sums[pair]["gradient"] @ rows_of(pair).T
    torch.testing.assert_close(columns_of(pair, pair.B.grad), compressed, rtol=1e-10, atol=1e-14)
    assert torch.equal(base_weight(pair), weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    sums = []
    for checkpointing in (None, reentrant):
        model = models.mlp(start="zero", checkpointing=checkpointing)
        pairs = [pair for pair in find_lora_pairs(model) if pair.name != "idle"]
        gradients = BaseGradients(pairs)
        gradients.attach()
        models.loss(model, 0).backward()
        gradients.commit()
        sums.append([gradients.sums[pair]["gradient"] for pair in pairs])
        assert [float(gradients.seen[pair]) for pair in pairs] == [1, 1, 1]
    assert all(torch.equal(one, two) for one, two in zip(*sums, strict=True))


def test_checkpointing_still_frees_the_inputs():
    """x is saved as autograd saves it: what lies in a checkpointed block is not held until the backward."""
    held = []
    for checkpointing in (False, True):
        model = One("linear")
        gradients = BaseGradients(find_lora_pairs(model))
        gradients.attach()
        seen = []
        model.layer.register_forward_hook(lambda m, args, y, seen=seen: seen.append(weakref.ref(args[0])))
        x = inputs("linear").requires_grad_()

        def block(x, model=model):
            return model(x * 2)

        y = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        gc.collect()
        held.append(seen[0]() is not None)
        y.sum().backward()
        gradients.commit()
        assert gradients.sums
    assert held == [True, False]


def test_the_model_may_change_the_output_in_place():
    model = One("linear")
    gradients = BaseGradients(find_lora_pairs(model))
    gradients.attach()
    base = model.layer.get_base_layer().weight.requires_grad_()
    F.relu(model.layer(inputs("linear")), inplace=True).square().mean().backward()
    gradients.commit()
    (found,) = gradients.sums.values()
    torch.testing.assert_close(found["gradient"], base.grad, rtol=1e-10, atol=1e-14)


def test_only_a_backward_counts():
    model = One("linear")
    gradients = BaseGradients(find_lora_pairs(model))
    gradients.attach()
    with torch.no_grad():
        model(inputs("linear"))
    model(inputs("linear"))
    model.requires_grad_(False)
    model(inputs("linear"))
    gradients.commit()
    assert not gradients.sums and not gradients.seen


def one_step(model, gradients, i, factor=1.0):
    model.zero_grad()
    (model(inputs("linear", i)).square().mean() * factor).backward()
    return gradients.commit()


def test_what_is_not_finite_is_left_out():
    model = One("linear")
    (pair,) = find_lora_pairs(model)
    results = []
    for factors in ([1.0, float("nan"), 1.0, float("inf")], [1.0, None, 1.0, None]):
        gradients = BaseGradients([pair])
        gradients.attach()
        for i, factor in enumerate(factors):
            if factor is not None:
                assert bool(one_step(model, gradients, i, factor)) == (factor != 1.0)
        results.append((gradients.sums[pair]["gradient"], gradients.seen[pair]))
        gradients.remove()
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1] == 2


@pytest.mark.parametrize("factor", [1.0, 2.0**-10, 0.3, -1.0, 0.0])
def test_what_gradients_were_multiplied_by_is_taken_over(factor):
    """Unscaling, clipping, maximisation; 1 is exactly 1."""
    found = []
    for after in (factor, 1.0):
        model = One("linear")
        (pair,) = find_lora_pairs(model)
        gradients = BaseGradients([pair])
        gradients.attach()
        model(inputs("linear")).square().mean().backward()
        pair.B.grad.mul_(after)
        gradients.commit()
        found.append(gradients.sums[pair]["gradient"])
    torch.testing.assert_close(found[0], factor * found[1], rtol=0 if factor == 1.0 else 1e-14, atol=0)


@pytest.mark.parametrize("offload", [False, True])
def test_16_bit_gradients_are_summed_in_float32(offload):
    model = One("linear").bfloat16()
    (pair,) = find_lora_pairs(model)
    sums = []
    for times in (300, 1):
        gradients = BaseGradients([pair], offload)
        gradients.attach()
        for _ in range(times):
            model.zero_grad()
            model(inputs("linear").bfloat16()).float().mean().backward()
            gradients.commit()
        sums.append(gradients.sums[pair]["gradient"])
        gradients.remove()
    assert sums[0].dtype == torch.float32 and sums[0].device.type == "cpu"
    # 300 additions in float32; in bfloat16 the sum stops growing at 256 times its terms
    torch.testing.assert_close(sums[0], 300 * sums[1], rtol=1e-4, atol=0)


def test_modules_hold_no_reference():
    model = One("linear")
    gradients = BaseGradients(find_lora_pairs(model))
    gradients.attach()
    alive = weakref.ref(gradients)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(inputs("linear")).sum().backward()
    gradients.commit()
    assert not gradients.sums
    del gradients
    gc.collect()
    assert alive() is None
    model(inputs("linear")).sum().backward()  # the hooks are idle now


def test_a_layer_without_a_base_weight_is_named():
    layer = Plain()
    del layer.weight
    (pair,) = find_lora_pairs(layer)
    with pytest.raises(ValueError, match=r"\(root\): no base weight of 5 × 6 entries"):
        base_weight(pair)


@pytest.mark.parametrize("kind", LAYERS)
def test_projections_of_the_input_make_the_gradient(kind):
    """gᵀ (X T) = Ḡ T and (gᵀ) X = Ḡ, with X never seen: also for patches, ids and padding."""
    model = One(kind)
    (pair,) = find_lora_pairs(model)
    x = inputs(kind)
    y = model.layer(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    G, rows = layer_gradient(pair, x, g), output_rows(pair, g)
    T = torch.randn(G.shape[1], 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(rows.mT @ projected(pair, x, T), G @ T, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gathered(pair, rows, x), G, rtol=1e-12, atol=1e-13)
