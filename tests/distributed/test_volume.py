"""The arithmetic of docs/distributed.md: what a step sends for the adapters of Llama-70B on 8 × 8 GPUs."""

import re
from pathlib import Path

from curvopt.functional.update import RULES

TEXT = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
LAYERS, RANK, OUTER, BYTES = 80, 16, 16, 4
HIDDEN, KEYS, INNER = 8192, 1024, 28672  # 64 heads of 128, of which 8 have keys and values
SHAPES = [  # (d_in, d_out) of q, k, v, o, gate, up, down
    (HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER),
    (INNER, HIDDEN),
]  # fmt: skip
PAIRS = LAYERS * len(SHAPES)
PARAMETERS = LAYERS * sum(RANK * (d_in + d_out) for d_in, d_out in SHAPES)
NUMBERS_OF_A = LAYERS * sum(RANK * d_in for d_in, _ in SHAPES)


def all_reduce(payload, processes):
    """What one process of a ring sends."""
    return 2 * (processes - 1) / processes * payload


def reduce_scatter(payload, processes):
    return (processes - 1) / processes * payload


def ours(processes):
    """Exchange one way, and sums: what a process sends in a step where so many share each matrix, in bytes."""
    exchange = NUMBERS_OF_A * BYTES / processes * (1 - 1 / processes)
    numbers = RULES["polar"].shared(RANK) + RANK * (RANK + OUTER)
    return exchange, all_reduce(2 * PAIRS * numbers * BYTES, processes)


def row(*numbers):
    """The numbers of a row of the table: MB, and per cent."""
    return [f"{number:.1f}" for number in numbers]


def test_the_table_of_llama_70b():
    gradients = PARAMETERS * BYTES
    assert f"{PAIRS} pairs" in TEXT and f"{PARAMETERS:,} parameters" in TEXT and f"{gradients / 1e6:.1f} MB" in TEXT
    wanted = {"DDP over 64": row(all_reduce(gradients, 64) / 1e6)}
    for name, processes in (("FSDP2 over 64", 64), ("HSDP, within a node of 8", 8)):
        exchange, sums = ours(processes)
        own, added = reduce_scatter(gradients, processes), 2 * exchange + sums
        wanted[name] = row(exchange / 1e6, sums / 1e6, own / 1e6, added / 1e6, 100 * added / own)
    wanted["HSDP, between 8 nodes"] = row(all_reduce(gradients / 8, 8) / 1e6)
    for name, numbers in wanted.items():
        (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {name}")]
        assert re.findall(r"\d+\.\d", line) == numbers, name


def test_an_exchange_in_numbers():
    """A of 16 × 4096 in float32 over 8 processes: a piece of two rows, of which an eighth stays."""
    sent = 2 * (4096 - 4096 // 8) * 4
    gathered = 2 * 4096 * 4 * 7
    assert f"{sent:,}\nbytes each way, where an all-gather would send {gathered:,}" in TEXT
    statistics = 224 * (16 * 17 + 2) * 4
    assert round(statistics / 1e6, 2) == 0.25
