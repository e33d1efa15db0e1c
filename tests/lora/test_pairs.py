"""Which modules are pairs, which way round their matrices are, and how both are looked up again."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import Parameter

from curvopt.lora import LoraPair, describe_search, find_lora_pairs, find_skipped, pair_by_name


class Toy(nn.Module):
    """One layer of each sort that PEFT can adapt."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 10)
        self.c1 = nn.Conv1d(4, 8, 3)
        self.c2 = nn.Conv2d(4, 8, (3, 2))
        self.c3 = nn.Conv3d(4, 8, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.mha = nn.MultiheadAttention(8, 2)


class Raw(nn.Module):
    """Two factors under given names, as parameters or as children."""

    def __init__(self, a, b, names=("lora_A", "lora_B"), **attributes):
        super().__init__()
        setattr(self, names[0], a)
        setattr(self, names[1], b)
        for name, value in attributes.items():
            setattr(self, name, value)


def raw(*shape):
    return Parameter(torch.randn(*shape))


def peft_toy(targets=("emb", "lin", "c1", "c2", "c3"), **kwargs):
    return get_peft_model(Toy(), LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), **kwargs))


def test_peft_kinds_in_module_order():
    model = peft_toy()
    pairs = find_lora_pairs(model)
    assert [(p.path.rpartition(".")[2], p.kind) for p in pairs] == [
        ("emb", "embedding"), ("lin", "linear"), ("c1", "conv"), ("c2", "conv"), ("c3", "conv"),
    ]  # fmt: skip
    for pair in pairs:
        assert (pair.dim_A, pair.dim_B, pair.rank, pair.scaling, pair.adapter) == (0, 1, 4, 3.0, "default")
        assert pair.name == pair.path == f"base_model.model.{pair.base_path}"
        assert model.get_submodule(pair.path) is pair.module and pair.is_peft
        assert pair.configs is model.peft_config and pair.a_trainable and pair.b_trainable
        assert (pair.signal is None) == (pair.kind == "embedding") == bool(pair.note)
    assert pairs[1].signal is model.base_model.model.lin.lora_A["default"]
    assert find_skipped(model) == []


def test_peft_adapters_and_names():
    model = peft_toy(("lin",))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin", "c1"]))
    assert [p.name for p in find_lora_pairs(model)] == [
        "base_model.model.lin", "base_model.model.lin:b", "base_model.model.c1:b",
    ]  # fmt: skip
    assert [p.rank for p in find_lora_pairs(model, "b")] == [2, 2]
    with pytest.raises(ValueError, match=r"'c' is on no layer.*'b', 'default'"):
        find_lora_pairs(model, "c")
    with pytest.raises(ValueError, match="adapters found: none"):
        find_lora_pairs(Raw(raw(2, 8), raw(9, 2)), "default")
    # An adapter called like a bare letter is not mistaken for a factor.
    assert [p.name for p in pair_by_name(model.named_parameters())] == [p.name for p in find_lora_pairs(model)]


def test_frozen_factors_are_still_pairs():
    model = peft_toy(("lin",))
    (pair,) = find_lora_pairs(model)
    pair.A.requires_grad_(False)
    assert (pair.a_trainable, pair.b_trainable) == (False, True)
    pair.B.requires_grad_(False)
    assert len(find_lora_pairs(model)) == 1


@pytest.mark.parametrize("how", ["inject", "wrapped", "nested"])
def test_base_paths(how):
    config = LoraConfig(r=2, target_modules=["lin"])
    if how == "inject":
        model, path = inject_adapter_in_model(config, Toy()), "lin"
    else:
        model, path = get_peft_model(Toy(), config), "base_model.model.lin"
    if how == "wrapped":  # what torch.compile adds to the path of a layer
        model.base_model.model.lin, path = nn.ModuleDict({"_orig_mod": model.base_model.model.lin}), path + "._orig_mod"
    if how == "nested":
        model, path = nn.ModuleDict({"module": model}), "module." + path
    (pair,) = find_lora_pairs(model)
    assert (pair.path, pair.base_path) == (path, "lin")
    assert pair.configs["default"] is config


def test_near_misses_are_told():
    model = peft_toy(("grouped", "mha"))
    assert find_lora_pairs(model) == []
    reasons = dict(find_skipped(model))
    assert set(reasons) == {"base_model.model.grouped", "base_model.model.mha"}
    assert "grouped convolution" in reasons["base_model.model.grouped"]
    assert "merges" in reasons["base_model.model.mha"]
    line = describe_search(model)
    assert "lora_A/lora_B" in line and "trainable" in line and "grouped convolution" in line and "\n" not in line


def test_experts_and_adalora_are_no_pairs():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = raw(3, 4, 6)

        def forward(self, x):
            return x @ self.weight[0]

    experts = nn.ModuleDict({"experts": Experts()})
    model = get_peft_model(experts, LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"]))
    assert find_lora_pairs(model) == [] and "experts" in find_skipped(model)[0][1]
    model = get_peft_model(Toy(), AdaLoraConfig(target_modules=["lin"], total_step=10))
    assert find_lora_pairs(model) == [] and "third factor" in find_skipped(model)[0][1]


def test_dora_is_a_pair_without_signal():
    (pair,) = find_lora_pairs(peft_toy(("lin",), use_dora=True))
    assert pair.signal is None and "DoraLinearVariant" in pair.note
    tune = Raw(nn.Linear(8, 2, bias=False), nn.Linear(2, 9, bias=False), ("lora_a", "lora_b"), magnitude=raw(9))
    (pair,) = find_lora_pairs(tune)
    assert pair.signal is None and "DoRA" in pair.note


STYLES = {
    "torchtune": (nn.Linear(8, 2, bias=False), nn.Linear(2, 9, bias=False), ("lora_a", "lora_b"), "linear", (0, 1)),
    "loralib": (raw(2, 8), raw(9, 2), ("lora_A", "lora_B"), "raw", (0, 1)),
    "transposed": (raw(8, 2), raw(2, 9), ("lora_A", "lora_B"), "raw", (1, 0)),
    "half": (nn.Linear(8, 2, bias=False), raw(2, 9), ("lora_A", "lora_B"), "linear", (0, 0)),
    "up-down": (nn.Conv2d(3, 2, 3), nn.Conv2d(2, 9, 1), ("lora_down", "lora_up"), "conv", (0, 1)),
    "bare": (raw(8, 2), raw(2, 9), ("A", "B"), "raw", (1, 0)),
    "small letters": (raw(2, 8), raw(9, 2), ("a", "b"), "raw", (0, 1)),
    "looked up": (nn.Embedding(8, 2), nn.Linear(2, 9), ("lora_A", "lora_B"), "embedding", (1, 1)),
    "square": (raw(4, 4), raw(4, 4), ("lora_A", "lora_B"), "raw", (0, 1)),
}


@pytest.mark.parametrize("style", STYLES)
def test_hand_written_styles(style):
    a, b, names, kind, dims = STYLES[style]
    (pair,) = find_lora_pairs(nn.ModuleDict({"layer": Raw(a, b, names)}))
    assert (pair.name, pair.kind, (pair.dim_A, pair.dim_B), pair.adapter) == ("layer", kind, dims, None)
    assert pair.A is (a if isinstance(a, Parameter) else a.weight)
    assert pair.B is (b if isinstance(b, Parameter) else b.weight)
    assert pair.signal is (a if kind in ("linear", "conv") else None)


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        (raw(6, 8), raw(9, 2), ("lora_A", "lora_B")),  # loralib's MergedLinear: r times the number of parts
        (raw(2, 8), raw(7), ("lora_A", "lora_B")),
        (nn.Linear(8, 2), nn.Linear(3, 9), ("lora_a", "lora_b")),
        (nn.Conv2d(3, 2, 3), nn.Conv2d(2, 9, 3), ("lora_down", "lora_up")),
    ],
)
def test_misfits_are_skipped_with_shapes(a, b, names):
    model = nn.ModuleDict({"layer": Raw(a, b, names)})
    assert find_lora_pairs(model) == []
    assert find_skipped(model)[0][0] == "layer" and names[0] in find_skipped(model)[0][1]


def test_bare_letters_need_a_small_rank():
    model = Raw(raw(9, 3), raw(4, 9), ("A", "B"))  # an inner 9 is no rank; state-space layers look like this
    assert find_lora_pairs(model) == [] == find_skipped(model)
    assert pair_by_name(model.named_parameters()) == []


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"scaling": 0.25, "alpha": 3, "rank": 2}, 0.25),
        ({"scale": 4}, 4.0),
        ({"alpha": 3, "rank": 2}, 1.5),
        ({"lora_alpha": 3.0, "r": 2}, 1.5),
        ({"alpha": torch.tensor(6.0), "rank": 2}, 3.0),
        ({"alpha": 3}, 1.0),
        ({"scaling": True}, 1.0),
        ({}, 1.0),
    ],
)
def test_scaling_of_plain_layers(attributes, expected):
    (pair,) = find_lora_pairs(Raw(raw(2, 8), raw(9, 2), **attributes))
    assert pair.scaling == expected and pair.name == "(root)"


def test_shared_parameters_give_one_pair():
    shared = Raw(raw(2, 8), raw(9, 2))
    model = nn.ModuleDict({"x": shared, "y": shared, "z": Raw(shared.lora_A, raw(9, 2))})
    assert [p.name for p in find_lora_pairs(model)] == ["x"]
    assert find_skipped(model) == [("z", "shares a parameter with x")]


def test_parameters_are_looked_up_again():
    model = peft_toy(("lin",))
    (pair,) = find_lora_pairs(model)
    layer, old = pair.module, (pair.A, pair.signal)
    layer.update_layer("default", 6, lora_alpha=12, config=model.peft_config["default"])
    assert pair.A is not old[0] and pair.signal is not old[1] and pair.rank == 6 and pair.scaling == 2.0
    layer.lora_A["default"].weight = raw(6, 6)
    assert pair.A is layer.lora_A["default"].weight


def test_pairs_travel_with_their_model():
    model = peft_toy(("lin",))
    pairs = find_lora_pairs(model)
    for twin, (pair,) in (copy.deepcopy((model, pairs)), pickle.loads(pickle.dumps((model, pairs)))):
        assert pair.A is twin.base_model.model.lin.lora_A["default"].weight is not pairs[0].A
    assert len({*pairs, *find_lora_pairs(model)}) == 2  # equal only to themselves


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 6), d_in=st.integers(1, 9), d_out=st.integers(1, 9), swap=st.booleans())
def test_orientation_takes_the_smallest_rank(r, d_in, d_out, swap):
    a, b = (raw(d_in, r), raw(r, d_out)) if swap else (raw(r, d_in), raw(d_out, r))
    (pair,) = find_lora_pairs(Raw(a, b))
    assert pair.rank == pair.B.shape[pair.dim_B] <= r
    assert (pair.dim_A, pair.dim_B) in ((0, 1), (1, 0))
    if d_in != d_out:  # only one reading is possible
        assert pair.rank == r and pair.dim_A == int(swap)
    (named,) = pair_by_name([("x.lora_A", a), ("x.lora_B", b)])
    assert (named.dim_A, named.dim_B) == (pair.dim_A, pair.dim_B)


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 4), c=st.integers(1, 4), kernel=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    last=st.booleans(),
)  # fmt: skip
def test_matrix_is_a_view_in_one_column_order(r, c, kernel, last):
    form = torch.channels_last if last else torch.contiguous_format
    down, up = nn.Conv2d(c, r, kernel).to(memory_format=form), nn.Conv2d(r, 5, 1).to(memory_format=form)
    (pair,) = find_lora_pairs(Raw(down, up))
    with torch.no_grad():
        for side, like in (("A", pair.A), ("B", pair.B)):
            state = torch.randn_like(like)
            view = pair.matrix(side, like)
            assert view.shape == ((r, like[0].numel()) if side == "A" else (5, r))
            inner = (pair.matrix(side, like) * pair.matrix(side, state)).sum()
            torch.testing.assert_close(inner, (like * state).sum())  # same columns on both sides
            view.fill_(7.0)
            assert (like == 7).all()


def test_matrix_refuses_other_layouts():
    (pair,) = find_lora_pairs(Raw(nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last), nn.Conv2d(2, 9, 1)))
    with pytest.raises(ValueError, match="no matrix view"):
        pair.matrix("A", torch.zeros(pair.A.shape))
    with pytest.raises(ValueError, match="4 dimensions"):
        pair.matrix("A", torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="side"):
        pair.matrix("a", pair.A)
    flat = torch.zeros(2, 12)
    assert pair.matrix("A", flat) is flat


def test_pairs_from_names():
    model = peft_toy()
    named = {p.name: p for p in pair_by_name(model.named_parameters())}
    for pair in find_lora_pairs(model):
        twin = named[pair.name]
        assert (twin.A is pair.A) and (twin.B is pair.B) and twin.kind == pair.kind and twin.rank == pair.rank
        assert twin.module is None and twin.signal is None and twin.scaling == 1.0 and "name" in twin.note
    assert pair_by_name(peft_toy(("grouped",)).named_parameters()) == []
    (pair,) = pair_by_name([("blk.A", raw(8, 2)), ("blk.c", raw(3)), ("blk.B", raw(2, 9)), ("blk.A.x", raw(2, 2))])
    assert (pair.name, pair.dim_A) == ("blk", 1)
    assert pair_by_name([("x.lora_A.weight", raw(2, 8))]) == []


def test_type_errors():
    with pytest.raises(TypeError, match=r"nn\.Module"):
        find_lora_pairs([raw(2, 2)])
    with pytest.raises(TypeError, match="Parameter"):
        pair_by_name([raw(2, 2)])
    assert "0 of them trainable" in describe_search(nn.Linear(2, 2).requires_grad_(False))
    assert isinstance(find_lora_pairs(Raw(raw(2, 8), raw(9, 2)))[0], LoraPair)
