"""The hook's sums against u and d that autograd gives, counted once whatever happens around them."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from curvopt.lora import Capture, find_lora_pairs, resize_pair

# Two orders of summation of some hundred float64 products differ by a few times 1e-16 of the largest.
EXACT = {"rtol": 1e-12, "atol": 1e-14}


class Layer(nn.Module):
    """A low-rank layer that keeps the u of each forward, so that a test can ask autograd for d."""

    def __init__(self, d_in=5, r=3, d_out=4, drop=0.0):
        super().__init__()
        self.base = nn.Linear(d_in, d_out)
        self.lora_a, self.lora_b = nn.Linear(d_in, r, bias=False), nn.Linear(r, d_out, bias=False)
        self.dropout, self.alpha, self.rank, self.seen = nn.Dropout(drop), 6.0, r, []

    def forward(self, x):
        u = self.lora_a(self.dropout(x))
        self.seen.append(u)
        return self.base(x) + self.alpha / self.rank * self.lora_b(u)


def captured(model):
    capture = Capture(find_lora_pairs(model))
    capture.attach()
    return capture


def layer(**kwargs):
    torch.manual_seed(0)
    model = Layer(**kwargs).double()
    return model, captured(model)


def check(sums, us, ds):
    rows = [(u.detach().flatten(0, -2), d.flatten(0, -2)) for u, d in zip(us, ds, strict=True)]
    torch.testing.assert_close(sums.uu, sum(u.T @ u for u, _ in rows), **EXACT)
    torch.testing.assert_close(sums.dd, sum(d.T @ d for _, d in rows), **EXACT)
    assert sums.n == sum(len(u) for u, _ in rows) and sums.calls == len(rows)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (5,)])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_sums_are_those_of_autograd(shape, drop):
    model, capture = layer(drop=drop)
    loss = model(torch.randn(shape, dtype=torch.float64)).square().sum()
    (u,) = model.seen
    (d,) = torch.autograd.grad(loss, u, retain_graph=True)
    capture.discard()
    loss.backward()
    (sums,) = capture.pop().values()
    check(sums, [u.reshape(-1, 3)], [d.reshape(-1, 3)])
    assert sums.uu.dtype == torch.float64 and capture.pop() == {}
    assert list(capture.fired.values()) == [1]  # the call of grad() filled no .grad, and counts nothing


def test_d_is_the_scaled_gradient_behind_B():
    model, capture = layer()
    x = torch.randn(7, 5, dtype=torch.float64)
    model(x).square().mean().backward()
    (pair,) = capture.pairs
    g = 2 * model(x).detach() / 28
    d = pair.scaling * g @ pair.B.detach()
    torch.testing.assert_close(capture.pop()[pair].dd, d.T @ d, **EXACT)
    torch.testing.assert_close(pair.A.grad, d.T @ x, **EXACT)


def test_micro_batches_sum_to_the_batch():
    model, capture = layer()
    x = torch.randn(12, 5, dtype=torch.float64)
    model(x).square().mean().backward()
    (whole,) = capture.pop().values()
    for part in x.chunk(4):
        (model(part).square().mean() / 4).backward()
    (parts,) = capture.pop().values()
    torch.testing.assert_close(parts.uu, whole.uu, **EXACT)
    torch.testing.assert_close(parts.dd, whole.dd, **EXACT)
    assert (parts.n, parts.calls, whole.calls) == (12, 4, 1)
    for part in x.chunk(4):
        model(part).square().mean().backward()
    (undivided,) = capture.pop().values()
    assert not torch.allclose(undivided.dd, whole.dd)  # the division is what makes them equal


@pytest.mark.parametrize("limit", [1, 300, 10**6])
def test_products_that_wait_are_the_same_sums(limit):
    x = torch.randn(12, 5, dtype=torch.float64)
    found = []
    for queue_limit in (0, limit):
        model, _ = layer()
        capture = Capture(find_lora_pairs(model), queue_limit=queue_limit)
        capture.attach()
        for part in x.split([3, 4, 5]):
            capture.mask = torch.arange(3.0) if len(part) == 3 else None
            model(part).square().mean().backward()
        found.append(next(iter(capture.pop().values())))
    at_once, waited = found
    torch.testing.assert_close(waited.both, at_once.both, **EXACT)
    assert at_once.n == waited.n == 12 and at_once.calls == waited.calls == 3


def test_static_sums_stay_in_place():
    model, capture = layer()
    static = Capture(find_lora_pairs(model), static=True)
    static.attach()
    places = set()
    for n in (3, 4):
        for part in torch.randn(n, 2, 5, dtype=torch.float64):
            model(part).square().mean().backward()
        (kept,) = static.stores
        places.add((kept.sums.data_ptr(), kept.n.data_ptr()))
        (want,), (got,) = capture.pop().values(), static.pop().values()
        assert torch.equal(got.both, want.both) and got.n == want.n == 2 * n and got.calls == n
        assert not kept.sums.any() and kept.n == 0, "ready for the next"
    assert len(places) == 1
    model(torch.randn(2, 5, dtype=torch.float64)).square().mean().backward()
    static.discard()
    (empty,) = static.pop().values()
    assert empty.n == 0 and not empty.both.any()


def test_masked_rows_enter_neither_sum_nor_count():
    model, capture = layer()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    capture.mask = mask.reshape(-1).float()
    model(x)[mask.bool()].square().mean().backward()  # as a loss does that ignores padding
    (padded,) = capture.pop().values()
    model(x[mask.bool()]).square().mean().backward()
    (real,) = capture.pop().values()
    torch.testing.assert_close(padded.both, real.both, **EXACT)
    assert padded.n == real.n == 5
    model(x)[mask.bool()].square().mean().backward()  # the mask is gone after pop: padding counts again
    (counted,) = capture.pop().values()
    assert counted.n == 8 and not torch.allclose(counted.uu, real.uu)
    torch.testing.assert_close(counted.dd, real.dd, **EXACT)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_checkpointing_counts_once(reentrant):
    model, capture = layer()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    plain = model(x).square().sum()
    plain.backward()
    (expected,) = capture.pop().values()
    out = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    out.square().sum().backward()
    (sums,) = capture.pop().values()
    assert len(model.seen) == (2 if reentrant is None else 3)  # the forward did run again
    assert (sums.n, sums.calls) == (6, 1)
    torch.testing.assert_close(sums.uu, expected.uu, **EXACT)
    torch.testing.assert_close(sums.dd, expected.dd, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_transformer(reentrant):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **shape)).double()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).double()
    capture, ids = captured(model), torch.randint(0, 40, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    plain = capture.pop()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    again = capture.pop()
    assert list(plain) == list(again) == capture.pairs and len(plain) == 14
    for pair, sums in again.items():
        assert (sums.n, sums.calls) == (18, 1)
        torch.testing.assert_close(sums.dd, plain[pair].dd, rtol=1e-9, atol=1e-18)


def test_shared_module_counts_each_use():
    model, capture = layer(d_in=4, d_out=4)
    loss = model(model(torch.randn(6, 4, dtype=torch.float64))).square().sum()
    ds = torch.autograd.grad(loss, model.seen, retain_graph=True)
    capture.discard()
    loss.backward()
    check(next(iter(capture.pop().values())), model.seen, ds)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions_sum_over_positions(conv, batched):
    dims = int(conv.__name__[4])
    net = nn.ModuleDict({"c": conv(3, 6, 2)})
    net.forward = net["c"].forward
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["c"], init_lora_weights=False)).double()
    capture = captured(model)
    x = torch.randn(*([2] if batched else []), 3, *[4] * dims, dtype=torch.float64)
    layer = model.base_model.model["c"]
    layer(x).square().sum().backward()
    u = layer.lora_A["default"](x).detach()
    (pair,) = capture.pairs
    (sums,) = capture.pop().values()
    rows = u.movedim(-1 - dims, -1).reshape(-1, 4)
    torch.testing.assert_close(sums.uu, rows.T @ rows, **EXACT)
    g = 2 * layer(x).detach().movedim(-1 - dims, -1).reshape(-1, 6)
    d = pair.scaling * g @ pair.matrix("B", pair.B).detach()
    torch.testing.assert_close(sums.dd, d.T @ d, **EXACT)
    assert sums.n == len(rows) == 3**dims * (2 if batched else 1)


def test_frozen_A_still_gives_d():
    model, capture = layer()
    x = torch.randn(6, 5, dtype=torch.float64)
    model(x).square().sum().backward()
    (free,) = capture.pop().values()
    grad = model.lora_b.weight.grad.clone()
    model.lora_a.requires_grad_(False)
    model.base.requires_grad_(False)
    model.zero_grad()
    model(x).square().sum().backward()
    (frozen,) = capture.pop().values()
    assert torch.equal(frozen.dd, free.dd) and torch.equal(frozen.uu, free.uu)
    assert torch.equal(model.lora_b.weight.grad, grad) and model.lora_a.weight.grad is None
    model.lora_b.requires_grad_(False)  # an inactive adapter is not watched, whatever needs a gradient around it
    model(x.requires_grad_()).square().sum().backward()
    assert capture.pop() == {} and capture.fired[capture.pairs[0]] == 2


def test_what_has_no_backward_leaves_nothing():
    model, capture = layer()
    x = torch.randn(6, 5, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model(x)
    capture.watch(False)
    model(x).sum().backward()
    assert capture.pop() == {} and sum(capture.fired.values()) == 0
    capture.watch(True)
    model(x).sum().backward()
    assert sum(capture.fired.values()) == 1


def test_an_exception_leaves_no_references():
    model, capture = layer()
    with pytest.raises(RuntimeError, match="user"):
        y = model(torch.randn(6, 5, dtype=torch.float64))
        ghost = weakref.ref(model.seen.pop())
        raise RuntimeError("user code")
    del y
    gc.collect()
    assert ghost() is None
    model(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    assert next(iter(capture.pop().values())).n == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_are_not_watched(how):
    model, capture = layer()
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    x = torch.randn(6, 5, dtype=torch.float64)
    twin(x).sum().backward()
    assert capture.pop() == {} and sum(capture.fired.values()) == 0
    model(x).sum().backward()
    assert len(capture.pop()) == 1
    renewed = captured(twin)
    twin(x).sum().backward()
    assert len(renewed.pop()) == 1


def test_a_copied_capture_starts_unattached():
    model, capture = layer()
    model(torch.randn(6, 5, dtype=torch.float64)).sum().backward()
    model.seen.clear()  # tensors with a graph cannot be copied
    twin_model, twin = copy.deepcopy((model, capture))
    assert twin.pop() == {} and list(twin.fired.values()) == [1]
    twin.attach()
    twin_model(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    assert next(iter(twin.pop().values())).n == 4 and next(iter(capture.pop().values())).n == 6


def test_attach_and_remove():
    model, capture = layer()
    capture.attach()
    assert len(model.lora_a._forward_hooks) == 1
    old, model.lora_a = model.lora_a, nn.Linear(5, 3, bias=False).double()
    capture.attach()
    assert len(old._forward_hooks) == 0 and len(model.lora_a._forward_hooks) == 1
    x = torch.randn(6, 5, dtype=torch.float64)
    model(x).sum().backward()
    capture.remove()
    capture.remove()
    model(x).sum().backward()
    assert len(model.lora_a._forward_hooks) == 0
    assert next(iter(capture.pop().values())).calls == 1
    capture.attach()
    ghost = weakref.ref(capture)
    pending = model(x).sum()
    del capture
    assert ghost() is None  # nothing on the model holds it
    pending.backward()
    model(x).sum().backward()


def test_sums_follow_a_new_rank_and_dtype():
    model, capture = layer()
    (pair,) = capture.pairs
    model(torch.randn(6, 5, dtype=torch.float64)).sum().backward()
    resize_pair(pair, 2)
    model(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    (sums,) = capture.pop().values()
    assert sums.uu.shape == sums.dd.shape == (2, 2) and sums.n == 4
    model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 5, dtype=torch.bfloat16)).sum().backward()
    u = model.seen[-1].detach().float()
    (sums,) = capture.pop().values()
    assert sums.uu.dtype == sums.dd.dtype == torch.float32
    torch.testing.assert_close(sums.uu, u.T @ u)  # from bf16 signals, but summed in fp32


def test_raw_parameters_are_left_alone():
    model = nn.ParameterDict({"lora_A": torch.randn(2, 5), "lora_B": torch.randn(4, 2)})
    capture = captured(model)
    assert len(capture.pairs) == 1 and capture.pop() == {} and not model._forward_hooks
