"""Small models that the tests share, the batches they are trained on, and a few words for comparing runs.

Nothing here imports ``curvopt``. Every model draws its weights from a seed, every batch from the number of its step,
so two runs that should agree see the same numbers.
"""

import copy
import io

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

# one thread: bitwise comparisons need one order of summation
torch.set_num_threads(1)


class LoraLinear(nn.Module):
    """A frozen linear map with a hand-written adapter: W x + s B A dropout(x), s = alpha / rank.

    ``watch`` is None or a list that gets the u of every forward, so that a test can ask autograd for d.
    ``bypass`` computes the same without calling ``lora_A``: hooks on it see nothing.
    """

    def __init__(self, d_in: int, d_out: int, r: int, drop: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d_in, r, bias=False), nn.Linear(r, d_out, bias=False)
        self.dropout, self.rank, self.alpha = nn.Dropout(drop), r, 1.5 * r
        self.watch: list[Tensor] | None = None
        self.bypass = False

    def forward(self, x: Tensor) -> Tensor:
        x_dropped = self.dropout(x)
        u = F.linear(x_dropped, self.lora_A.weight) if self.bypass else self.lora_A(x_dropped)
        if self.watch is not None:
            self.watch.append(u)
        return self.base(x) + self.alpha / self.rank * self.lora_B(u)


class LoraMLP(nn.Module):
    """Two adapted layers of one shape, a third of another, a norm and a head outside pairs, a layer nobody calls."""

    def __init__(self, width: int = 8, r: int = 4, drop: float = 0.0, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.first, self.second = LoraLinear(width, width, r, drop), LoraLinear(width, width, r, drop)
        self.third = LoraLinear(width, 6, r - 1, drop)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(6, 5)
        self.idle = LoraLinear(width, width, r)
        self.checkpointing = checkpointing  # None, or use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second, self.third):
            if block is self.third:
                x = self.norm(x)
            x = block(x) if self.checkpointing is None else checkpoint(block, x, use_reentrant=self.checkpointing)
            x = torch.tanh(x)
        return self.head(x)

    @property
    def layers(self) -> list[LoraLinear]:
        """The adapted layers that are called."""
        return [self.first, self.second, self.third]


def mlp(dtype: torch.dtype = torch.float64, start: str = "random", seed: int = 0, **kwargs) -> LoraMLP:
    """Return a LoraMLP; ``start`` is "zero" (B = 0, as LoRA begins) or "random"."""
    torch.manual_seed(seed)
    model = LoraMLP(**kwargs)
    for layer in [*model.layers, model.idle]:
        nn.init.normal_(layer.lora_B.weight, std=0.3)
        if start == "zero":
            nn.init.zeros_(layer.lora_B.weight)
    return model.to(dtype)


def batch(model: nn.Module, i: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Return the i-th batch of a LoraMLP: ``(rows, 3, width)`` inputs and labels."""
    g = torch.Generator().manual_seed(1000 + i)
    width, dtype = model.first.lora_A.in_features, model.head.weight.dtype
    x = torch.randn(rows, 3, width, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(5, (rows, 3), generator=g)


def loss(model: nn.Module, i: int, rows: int = 6) -> Tensor:
    """Return the mean cross entropy over the tokens of the i-th batch."""
    if not isinstance(model, LoraMLP):
        return llama_loss(model, i) if hasattr(model, "peft_config") else model.loss(i)
    x, y = batch(model, i, rows)
    if model.checkpointing:  # reentrant checkpointing wants an input with a gradient
        x.requires_grad_()
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


class Single(LoraLinear):
    """One adapted layer that is a whole model, so that its pair leads back to all of it."""

    def loss(self, i: int) -> Tensor:
        g = torch.Generator().manual_seed(1000 + i)
        x = torch.randn(7, self.base.in_features, generator=g, dtype=torch.float64).to(self.base.weight.dtype)
        y = torch.randn(7, self.base.out_features, generator=g, dtype=torch.float64).to(self.base.weight.dtype)
        return (self(x) - y).square().mean()


def single(dtype: torch.dtype = torch.float64, r: int = 3) -> Single:
    """Return a one-layer model with B ≠ 0."""
    torch.manual_seed(0)
    return Single(7, 5, r).to(dtype)


def llama(
    dtype: torch.dtype = torch.float32,
    r: int = 4,
    adapters: tuple[str, ...] = ("default",),
    start: str = "zero",
    **kwargs,
) -> nn.Module:
    """Return a PEFT model around a Llama of hidden size 32 and two layers, adapters on all seven linears."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    lora = {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0, "target_modules": "all-linear", **kwargs}
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**lora), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(**lora))
    if start == "random":
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def llama_ids(i: int, rows: int = 2) -> Tensor:
    """Return the token ids of the i-th batch."""
    return torch.randint(64, (rows, 10), generator=torch.Generator().manual_seed(2000 + i))


def llama_loss(model: nn.Module, i: int, rows: int = 2) -> Tensor:
    """Return the language-model loss of the i-th batch."""
    ids = llama_ids(i, rows)
    return model(input_ids=ids, labels=ids).loss


class Mixed(nn.Module):
    """An embedding, a convolution and a linear map with PEFT adapters, a DoRA layer, and a norm and a head without."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.ModuleDict(
            {"embed": nn.Embedding(20, 8), "conv": nn.Conv2d(8, 8, 3, padding=1), "fc": nn.Linear(8, 8)}
        )
        self.back = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.front["embed"](ids).mT.unflatten(-1, (4, 4))
        h = torch.tanh(self.front["conv"](h)).flatten(2).mT
        h = self.norm(torch.tanh(self.front["fc"](h)))
        return self.head(torch.tanh(self.back["fc"](h)).mean(1))

    def loss(self, i: int) -> Tensor:
        g = torch.Generator().manual_seed(3000 + i)
        ids = torch.randint(20, (6, 16), generator=g)
        return F.cross_entropy(self(ids), ids[:, 0] % 4)


def mixed(dtype: torch.dtype = torch.float64) -> Mixed:
    """Return a Mixed model; the base weights are frozen, the norm, the head and DoRA's magnitude are not."""
    torch.manual_seed(0)
    model = Mixed()
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=["embed", "conv", "fc"])
    inject_adapter_in_model(plain, model.front)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["fc"], use_dora=True), model.back)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith(("norm", "head")))
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, begin: int = 0) -> list[float]:
    """Train on batches ``begin, begin + 1, ...``; return the losses before each step."""
    losses = []
    for i in range(begin, begin + steps):
        optimizer.zero_grad()
        value = loss(model, i)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Return copies of all parameters and, under "name/key", of all optimizer state."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for p, state in (optimizer.state if optimizer is not None else {}).items():
        found |= {f"{names[p]}/{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def differences(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Return the names whose tensors differ in dtype, shape or any value (0 and −0 are equal, NaN is not itself)."""
    unequal = [k for k in one.keys() & two.keys() if one[k].dtype != two[k].dtype or not torch.equal(one[k], two[k])]
    return sorted(unequal + list(one.keys() ^ two.keys()))


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], ignore: tuple[str, ...] = ()) -> None:
    """Assert bitwise equality of two snapshots, but for the state keys in ``ignore``."""
    assert [name for name in differences(one, two) if name.rpartition("/")[2] not in ignore] == []


def assert_near(one: dict[str, Tensor], two: dict[str, Tensor], rtol: float, atol: float) -> None:
    """Assert that two snapshots agree to a tolerance."""
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def round_trip(state_dict: dict) -> dict:
    """Return a state_dict as it comes back from a file, read with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copied_into(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """Load the weights of ``model`` into ``fresh`` and return it."""
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    return fresh


def hooks(model: nn.Module) -> int:
    """Return how many hooks of any kind stand on the modules of a model."""
    kinds = [word for word in vars(nn.Module()) if word.endswith("_hooks")]
    return sum(len(getattr(module, word)) for module in model.modules() for word in kinds)
