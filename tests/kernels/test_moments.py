import pytest
import torch
import triton
from curvopt.kernels import moments
from update_cases import launches

from curvopt import kernels
from curvopt.functional import moments as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
# float32 sums of exact products: a few ε of Σ|zᵢzⱼ|, whose norm is at most r times that of the result. Matrix units cut
# where the interpreter rounds: on an H200 16-bit rows were seen at 1.0e-6 to 2.0e-6 (501 rows), here at 2e-7
BOUND = 3e-6 if torch.cuda.is_available() else 1e-6


@pytest.fixture(autouse=True)
def _ranges(request, device):
    tensors = any(word in request.node.name for word in ("gram", "rows", "counts"))
    if tensors and device.type == "cpu" and triton.__version__ < "3.7":
        pytest.skip("the interpreter of triton 3.6 cannot loop up to a tensor with numpy 2.4")


def rows(N, r, dtype, seed=0):
    return torch.randn(N, r, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(z, weights=None, count=None):
    z = z.double()[:count]
    return z.mT @ (z if weights is None else z * weights.double()[:count, None])


def error(got, want):
    return ((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("N", [1, 37, 501])
def test_gram(N, r, dtype, device):
    z = rows(N, r, dtype)
    assert kernels.supports("gram", z.to(device))
    got = moments.gram(z.to(device))
    assert got.dtype == torch.float32 and error(got, exact(z)) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("N", [200, 1000, 20_011])
def test_gram_of_more_rows(N, r, dtype, device):
    z = rows(N, r, dtype)
    assert error(moments.gram(z.to(device)), exact(z)) <= BOUND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [4, 12, 16, 48])
def test_counts_weights_and_scale(r, dtype, device):
    sizes = (300, 1, 64, 37)
    zs = [rows(n, r, dtype, n) for n in sizes]
    counts = torch.tensor([299, 1, 0, 20])
    for z, n in zip(zs, counts, strict=True):
        z[n:] = float("nan")  # padding tokens may hold anything
    weights = [torch.rand(n) for n in sizes]
    scale = torch.tensor([0.5, 2.0, 1.0, 1e-3])
    ours = [z.to(device) for z in zs]
    for w in (None, weights):
        got = moments.gram_many(ours, counts.to(device), w and [x.to(device) for x in w], scale.to(device)).cpu()
        for m, z in enumerate(zs):
            want = scale[m].double() * exact(z, None if w is None else w[m], counts[m])
            assert error(got[m], want) <= BOUND


@pytest.mark.parametrize("N, split", [(100, 1), (9000, None)])
def test_rows_split_over_programs_and_summed_in_order(N, split, device):
    z = rows(N, 12, torch.bfloat16).to(device)
    with launches() as seen:
        results = [moments.gram(z) for _ in range(3)]
    assert all(torch.equal(x, results[0]) for x in results), "repeatable to the bit"
    assert all((grid[1] == 1) == (split == 1) for _, grid, _ in seen), "both ways of splitting are taken"
    assert error(results[0], exact(z.cpu())) <= BOUND


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("r", [4, 6, 16, 48, 128])
def test_ema_is_the_reference(r, decay, device):
    L = 3
    S, t = torch.zeros(L, r, r, device=device), torch.zeros(L, dtype=torch.int64, device=device)
    want, t_want = torch.zeros(L, r, r, dtype=torch.float64), torch.zeros(L, dtype=torch.int64)
    for n in range(4):
        X = torch.randn(L, r, r, generator=torch.Generator().manual_seed(n))
        if n == 2:
            X[1, 0, 0] = float("nan")
        found = torch.tensor(float(n == 1))
        assert kernels.supports("ema_", S, X.to(device), t, decay, found.to(device))
        took = moments.ema_(S, X.to(device), t, decay, found.to(device))
        expected = reference.ema_(want, X.double(), t_want, decay, found)
        assert torch.equal(took.cpu(), expected) and torch.equal(t.cpu(), t_want)
        # three roundings a step of values of order one
        torch.testing.assert_close(S.cpu().double(), want, rtol=0, atol=1e-6)
        if n == 0:
            assert torch.equal(S.cpu(), X), "the first observation is taken as it is"


@pytest.mark.parametrize("dtype, M", [(torch.float32, 5), (torch.bfloat16, 20), (torch.float16, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_grams_added_in_one_launch(dtype, M, weighted, device):
    r, N = 8, 70
    zs = [rows(N + m, r, dtype, m) for m in range(M)]
    weights = [torch.rand(len(z)) for z in zs] if weighted else None
    index = torch.randperm(M + 3, generator=torch.Generator().manual_seed(0))[:M].tolist()
    start = torch.randn(M + 3, r, r)
    sums, want = start.to(device, copy=True), start.double()
    ours = [z.to(device) for z in zs], None if weights is None else [w.to(device) for w in weights]
    assert kernels.supports("gram_add_", sums, index, *ours)
    with launches() as seen:
        for sign in (1.0, -1.0, 1.0):
            assert kernels.OPS["gram_add_"](sums, index, *ours, sign) is sums
    assert len(seen) == 3
    for m, place in enumerate(index):
        want[place] += exact(zs[m], None if weights is None else weights[m])
    assert error(sums, want) <= 3 * BOUND
    others = [m for m in range(M + 3) if m not in index]
    assert torch.equal(sums[others].cpu(), start[others]), "what nobody adds to stays to the bit"


def test_grams_are_added_as_the_reference_adds_them(device):
    zs, sums = [rows(37, 6, torch.float32, m) for m in range(3)], torch.randn(4, 6, 6)
    got = moments.gram_add_(sums.to(device, copy=True), [3, 0, 1], [z.to(device) for z in zs], None, 0.5)
    want = reference.gram_add_(sums.double(), [3, 0, 1], zs, None, 0.5)
    assert error(got, want) <= BOUND


def test_gram_without_a_row_fails_the_check(device):
    z = rows(501, 8, torch.bfloat16)
    assert error(moments.gram(z[:-1].contiguous().to(device)), exact(z)) > BOUND


def test_supports(device):
    z = rows(20, 8, torch.float32).to(device)
    assert kernels.supports("gram", z)
    for refused in (z.double(), z.mT, z[None], rows(4, 129, torch.float32).to(device), z.long()):
        assert not kernels.supports("gram", refused)
    S, t = torch.zeros(2, 8, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    assert kernels.supports("gram_add_", S, [1, 0], [z, z]) and not kernels.supports("gram_add_", S, [1, 1], [z, z])
    assert not kernels.supports("gram_add_", S, [2], [z]) and not kernels.supports("gram_add_", S.double(), [0], [z])
    assert not kernels.supports("gram_add_", S[:, :4, :4], [0], [z])
    assert kernels.supports("ema_", S, S, t, 0.9)
    assert not kernels.supports("ema_", S.double(), S.double(), t, 0.9)
    assert not kernels.supports("ema_", S, S[:1], t, 0.9)
