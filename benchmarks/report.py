"""Tables from the CSVs: all of them into results/tables.md, the short ones into the texts between their markers.

    python benchmarks/report.py

A pair of markers in one of TEXTS is ``<!-- table: NAME -->`` and ``<!-- end -->``; the text between them is replaced. A
name that no table has is an error.
"""

import re
import statistics
from collections.abc import Callable

from cadence import CONTESTANTS as CADENCES
from cadence import EVERY_STEP
from contestants import CHOICES, CONTESTANTS
from findings import BASE, HIDDEN, Runs, exponent, number, shown, step_times
from harness import RESULTS, Row, read_csv, table
from ladders import PARTS, RANKS
from tasks import TASKS
from training import SEARCH_SEED

ROOT = RESULTS.parents[1]
TEXTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "kernels", "outer-factors", "gora", "ranks", "settings")),
)
MARKED = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
SHORTER = (0.8, 0.7, 0.6)
NAMES = [name for name in (*CONTESTANTS, *CHOICES) if name not in HIDDEN]
TUNED = "AdamW, tuned betas"
# close relatives and peers of GritKFAC
AGAINST = (
    TUNED, "GritKFAC, no outer factors", "GritKFAC (0.9, 0.999)", "GritKFAC eigen", "LoRA-Muon", "LoRA-RITE", "Muon",
    "SOAP",
)  # fmt: skip


def summary_table(runs: Runs) -> list[Row]:
    """Return README's table: test loss on the text tasks, of a few optimizers."""
    tasks = {
        "language": "Python source → English (language)",
        "headers": "docstrings → C++ headers (headers)",
        "headers32": "the same at rank 32 (headers32)",
    }
    labels = {"AdamW": "AdamW", TUNED: "AdamW, betas tuned too", "GritKFAC": "`GritKFAC`", "Muon": "Muon"}
    return [
        {"task": title}
        | {label: f"{statistics.fmean(runs.column(task, name, 'test')):.3f}" for name, label in labels.items()}
        for task, title in tasks.items()
    ]


def task_table(runs: Runs, task: str) -> list[Row]:
    """Return a line an optimizer: everything that is measured on a task."""
    lines = []
    for name in runs.optimizers(task):
        edge = "*" if runs.at_edge(task, name) else ""
        line: Row = {"optimizer": name, "lr": f"{runs.rate(task, name):g}{edge}"}
        line["seeds"] = len(runs.best(task, name))
        line["test loss"] = shown(runs.column(task, name, "test"))
        line["Δ to AdamW"] = "" if name == BASE else shown(runs.difference(task, name, "test"), sign=True)
        if accuracy := runs.column(task, name, "accuracy"):
            line["accuracy"] = shown([100 * a for a in accuracy], 1) + " %"
        line["earlier task"] = shown(runs.column(task, name, "retention"), 3)
        line["‖ΔW‖"] = number(statistics.fmean(runs.column(task, name, "update_norm")), 1)
        line["steps needed"] = "1" if name == BASE else runs.steps_shown(task, name)
        crossed = runs.crossing(task, name, "seconds")
        line["seconds needed"] = number(statistics.median(crossed)) if crossed else "–"
        line["parameters"] = f"{statistics.fmean(runs.column(task, name, 'adapter_parameters')):,.0f}"
        lines.append(line)
    return lines


def quality_table(runs: Runs, to: str = BASE) -> list[Row]:
    """Return a line an optimizer: the paired difference of test loss to one of them, task by task."""
    lines = []
    for name in NAMES:
        line: Row = {"optimizer": name}
        for task in runs.tasks():
            if name not in runs.optimizers(task):
                line[task] = ""
                continue
            values = runs.column(task, name, "test") if name == to else runs.difference(task, name, "test", to=to)
            line[task] = shown(values, sign=name != to)
        lines.append(line)
    return lines


def against_table(runs: Runs) -> list[Row]:
    """Return a line a close relative or peer: GritKFAC's test loss less its, task by task."""
    lines = []
    for name in AGAINST:
        line: Row = {"`GritKFAC` less": name}
        for task in runs.tasks():
            values = runs.difference(task, "GritKFAC", "test", to=name) if name in runs.optimizers(task) else []
            line[task] = shown(values, sign=True) if values else ""
        lines.append(line)
    return lines


def steps_table(runs: Runs, to: str = BASE) -> list[Row]:
    """Return a line an optimizer that was run with fewer steps: Δ validation loss to a full run of AdamW."""
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in runs.rows if row["horizon"] in SHORTER):
        if name in HIDDEN:
            continue
        for horizon in (1.0, *SHORTER):
            line: Row = {"optimizer": name, "steps": f"{horizon:g}"}
            for task in runs.tasks():
                values = runs.difference(task, name, "valid", horizon, to) if name in runs.optimizers(task) else []
                line[task] = shown(values, sign=True) if values else ""
            if any(line[task] for task in runs.tasks()):
                lines.append(line)
    return lines


def shorter_table(runs: Runs) -> list[Row]:
    """Return GritKFAC with fewer steps: Δ validation loss to full runs of AdamW, at default and at tuned betas."""
    lines = []
    for to in (BASE, TUNED):
        for horizon in SHORTER:
            line: Row = {"against": to, "steps": f"{horizon:g}"}
            for task in runs.tasks():
                values = runs.difference(task, "GritKFAC", "valid", horizon, to)
                line[task] = shown(values, sign=True) if values else ""
            lines.append(line)
    return lines


def forgetting_table(runs: Runs) -> list[Row]:
    """Return a line a task and horizon: what GritKFAC forgets as a share of AdamW's, beside Δ validation loss."""
    lines = []
    for before in read_csv(RESULTS / "before.csv"):
        task = before["task"]
        for to in (BASE, TUNED):
            for horizon in (1.0, *SHORTER[1:]):
                line: Row = {"task": task, "against": to, "steps": f"{horizon:g}"}
                base, ours = runs.best(task, to), runs.best(task, "GritKFAC", horizon)
                pairs = [(row["retention"], base[seed]["retention"]) for seed, row in ours.items() if seed in base]
                line["Δ validation loss"] = shown(runs.difference(task, "GritKFAC", "valid", horizon, to), sign=True)
                line["forgotten"] = shown([(a - before["retention"]) / (b - before["retention"]) for a, b in pairs], 2)
                lines.append(line)
    return lines


def drop_in_table(runs: Runs) -> list[Row]:
    """Return a line a task: GritKFAC at AdamW's best learning rate, less AdamW."""
    lines = []
    for task in runs.tasks():
        lr, line = runs.rate(task, BASE), {"task": task}
        line["AdamW's rate, GritKFAC's"] = f"{lr:g}, {runs.rate(task, 'GritKFAC'):g}"
        for key in ("valid", "test"):
            base, ours = runs.best(task, BASE), runs.at(task, "GritKFAC", lr)
            values = [row[key] - base[seed][key] for seed, row in ours.items() if seed in base]
            line[f"Δ {key}"] = shown(values, sign=True) if values else ""
        lines.append(line)
    return lines


def betas_table(runs: Runs) -> list[Row]:
    """Return a line a task: AdamW's lowest loss on the seed that chooses, by betas; the chosen ones in bold."""
    lines = []
    for task in runs.tasks():
        line: Row = {"task": task}
        for name in CHOICES[TUNED]:
            found = [r["valid"] for r in runs.rows if (r["task"], r["optimizer"]) == (task, name) and not r["seed"]]
            text = f"{min(found):.4f}" if found else ""
            label = "(0.9, 0.999)" if name == BASE else name.removeprefix("AdamW ")
            line[label] = f"**{text}**" if text and runs.variant(task, TUNED) == name else text
        lines.append(line)
    return lines


def ladder_table(runs: Runs, part: str) -> list[Row]:
    """Return a line an optimizer: Δ validation loss to the best AdamW, and the learning rate, rung by rung."""
    rungs = [task for task in PARTS[part] if runs.optimizers(task)]
    names = dict.fromkeys(name for task in rungs for name in runs.optimizers(task))
    lines = []
    for name in sorted(names, key=lambda n: n != TUNED):
        for horizon in (1.0, *SHORTER):
            line: Row = {"optimizer": name if horizon == 1 else f"{name}, {horizon:g} of the steps"}
            for task in rungs:
                found = runs.best(task, name, horizon) if name in runs.optimizers(task) else {}
                if not found:
                    continue
                if name == TUNED:
                    text = shown([row["valid"] for row in found.values()])
                else:
                    text = shown(runs.difference(task, name, "valid", horizon, TUNED), sign=True)
                rate = f" @{runs.rate(task, name):g}" if horizon == 1 else ""
                line[task.removeprefix("headers, ")] = text + rate
            if len(line) > 1:
                lines.append(line)
    return lines


def transfer_table(runs: Runs) -> list[Row]:
    """Return a line an optimizer: its best learning rate by rank, and what keeping rank 8's costs."""
    rungs = [task for task in RANKS if runs.optimizers(task)]
    lines = []
    for name in dict.fromkeys(name for task in rungs for name in runs.optimizers(task)):
        line: Row = {"optimizer": name}
        for task in (task for task in rungs if name in runs.optimizers(task)):
            kept = runs.rate(rungs[0], name)
            searched = {row["lr"]: row["valid"] for row in runs.searched(task, name)}
            best = min(searched.values())
            rise = f" (+{searched[kept] - best:.4f})" if kept in searched else " (–)"
            line[task.removeprefix("headers, ")] = f"{runs.rate(task, name):g}" + (rise if task != rungs[0] else "")
        lines.append(line)
    return lines


def starts_table() -> list[Row]:
    """Return a line a start and optimizer: Δ test loss to the optimizer without a start, task by task."""
    rows = [row for row in read_csv(RESULTS / "gora_starts.csv") if row["seed"] != SEARCH_SEED]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    lines = []
    for name in ("AdamW", "GritKFAC"):
        for label in dict.fromkeys(row["optimizer"] for row in rows if row["optimizer"].endswith(name)):
            line: Row = {"start + optimizer": label}
            for task in tasks:
                of = {(r["optimizer"], r["seed"]): r["test"] for r in rows if r["task"] == task}
                own = {seed: loss for (optimizer, seed), loss in of.items() if optimizer == label}
                base = {seed: of[name, seed] for seed in own if (name, seed) in of}
                values = list(own.values()) if label == name else [own[s] - base[s] for s in base]
                line[task] = shown(values, sign=label != name) if values else ""
            lines.append(line)
    return lines


def parameters_table(runs: Runs) -> list[Row]:
    """Return a line a task: what rank adaptation saves, and what it costs in loss."""
    lines = []
    for task in runs.tasks():
        for name in runs.optimizers(task):
            full, own = (statistics.fmean(runs.column(task, n, "adapter_parameters")) for n in ("GritKFAC", name))
            if not name.startswith("GritKFAC, ranks"):
                continue
            lines.append({
                "task": task, "optimizer": name, "parameters": f"{own:,.0f}",
                "saved": f"{100 * (1 - own / full):.0f} %",
                "mean rank": number(statistics.fmean(runs.column(task, name, "mean_rank")), 1),
                "Δ test loss to AdamW": shown(runs.difference(task, name, "test"), sign=True),
            })  # fmt: skip
    return lines


def ablation_table() -> list[Row]:
    """Return a line a variant of GritKFAC: the paired difference of test loss to the default at its best rate."""
    runs = Runs(RESULTS / "ablations.csv")
    tasks = list(dict.fromkeys(row["task"] for row in runs.rows))
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in runs.rows):
        line: Row = {"variant": name}
        for task in tasks:
            base, own = runs.best(task, "default"), runs.best(task, name) if name in runs.optimizers(task) else {}
            paired = [own[s]["test"] - base[s]["test"] for s in own if s in base]
            line[task] = "" if not paired else shown(paired, sign=True)
            if name == "default":
                line[task] = shown([row["test"] for row in own.values()])
        lines.append(line)
    return lines


def cadence_table() -> list[Row]:
    """Return a line a reader of S_u and S_d: Δ test loss of observing one step in ten to observing every step."""
    runs = Runs(RESULTS / "cadence.csv")
    lines = []
    for name in (n for n in CADENCES if n + EVERY_STEP in CADENCES):
        line: Row = {"observed at one step in ten": name}
        for task in dict.fromkeys(row["task"] for row in runs.rows):
            base, own = runs.best(task, name + EVERY_STEP), runs.best(task, name)
            line[task] = shown([own[s]["test"] - base[s]["test"] for s in own if s in base], sign=True)
        lines.append(line)
    return lines


def step_time_table(part: str, where: str) -> list[Row]:
    """Return a line an optimizer, a column a place: the ratio to fused AdamW."""
    rows = step_times(part)
    places = list(dict.fromkeys(row[where] for row in rows))
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = {row[where]: row for row in rows if row["optimizer"] == name}
        lines.append({"optimizer": name, **{str(p): _ratio(own.get(p)) for p in places}})
    return lines


def growth_table() -> list[Row]:
    """Return a line an optimizer: fitted exponents of step time in pairs, d and r."""
    rows = step_times("axes")
    return [
        {
            "optimizer": name,
            **{
                f"in {axis}": number(exponent([r for r in rows if r["optimizer"] == name and r["axis"] == axis], axis))
                for axis in ("pairs", "d", "r")
            },
        }
        for name in dict.fromkeys(row["optimizer"] for row in rows)
    ]


def memory_table() -> list[Row]:
    """Return a line an optimizer: state and peak against AdamW's."""
    rows = read_csv(RESULTS / "memory.csv")
    names = dict.fromkeys(row["optimizer"] for row in rows)
    lines = []
    for name in names:
        line: Row = {"optimizer": name}
        for row in (row for row in rows if row["optimizer"] == name):
            line[f"state, {row.get('model', row['pairs'])}"] = number(row["state_ratio"])
            line[f"peak, {row.get('model', row['pairs'])}"] = number(row["peak_ratio"])
        lines.append(line)
    return lines


def device_steps_table() -> list[Row]:
    """Return a line an optimizer: times of a step on the adapters of the first model, and ratios to fused AdamW's."""
    rows = read_csv(RESULTS / "device_steps.csv")
    return [
        {
            "optimizer": f"`{row['optimizer']}`" if "GritKFAC" in row["optimizer"] else row["optimizer"],
            "eager, ms": number(row["wall_ms"]),
            "ratio": number(row["ratio_wall"]),
            "after a backward, ms": number(row["after_wall_ms"]),
            "its ratio": number(row["ratio_after_wall"]),
            "as a CUDA graph, ms": number(row["graph_ms"]),
            "the graph's ratio": number(row["ratio_graph"]),
        }
        for row in rows
        if (row["model"], row["r"]) == (rows[0]["model"], rows[0]["r"])
    ]


def device_launches_table() -> list[Row]:
    """Return a line a kernel of a default step at rank 16, with and without outer factors: time, share of a copy's."""
    rows = [row for row in read_csv(RESULTS / "device_launches.csv") if row["r"] == 16 and row["kernel"][0] == "_"]
    lines: dict[str, Row] = {}
    for row in rows:
        if row["optimizer"] in ("GritKFAC", "GritKFAC(outer_rank=0)"):
            share = f" ({100 * row['share_of_copy']:.0f} %)" if row["share_of_copy"] is not None else ""
            line = lines.setdefault(row["kernel"], {"kernel": f"`{row['kernel']}`"})
            line[f"`{row['optimizer']}`, µs"] = f"{row['us']:.0f}{share}"
    return list(lines.values())


def device_others_table() -> list[Row]:
    """Return a line an optimizer with factors of whole matrices: a step on one block of Qwen2.5-0.5B, on a device."""
    return [
        {"optimizer": row["optimizer"], "mean, ms": number(row["mean_ms"], 1), "ratio": f"{row['ratio']:.0f}"}
        for row in read_csv(RESULTS / "device_heavy.csv")
    ]


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    known = row["ratio_p10"] is not None
    return f"{row['ratio']:.3g}" + (f" ({row['ratio_p10']:.3g} to {row['ratio_p90']:.3g})" if known else "")


def fill(text: str, bodies: dict[str, str]) -> str:
    """Replace what stands between the markers of every table."""
    return MARKED.sub(lambda m: f"{m[1]}\n{bodies[m[2]]}\n\n{m[3]}", text)


def main() -> None:
    """Write results/tables.md and the tables of README.md and docs/benchmarks.md."""
    runs, ladders = Runs(), Runs(RESULTS / "ladders.csv")
    tables: dict[str, Callable[[], list[Row]]] = {
        "summary": lambda: summary_table(runs),
        "quality": lambda: quality_table(runs),
        "quality, tuned betas": lambda: quality_table(runs, TUNED),
        "GritKFAC less": lambda: against_table(runs),
        "steps": lambda: steps_table(runs),
        "steps, tuned betas": lambda: steps_table(runs, TUNED),
        "fewer steps": lambda: shorter_table(runs),
        "forgetting": lambda: forgetting_table(runs),
        "betas": lambda: betas_table(runs),
        "drop-in": lambda: drop_in_table(runs),
        **{f"ladder of {part}": lambda part=part: ladder_table(ladders, part) for part in PARTS},
        "rates by rank": lambda: transfer_table(ladders),
        "starts": starts_table,
        "parameters": lambda: parameters_table(runs),
        **{f"task {task}": lambda task=task: task_table(runs, task) for task in runs.tasks()},
        "ablations": ablation_table,
        "cadence": cadence_table,
        "step time, few pairs": lambda: step_time_table("blocks", "d"),
        "step time, models": lambda: step_time_table("models", "model"),
        "step time, split": lambda: step_time_table("split", "pairs"),
        "step time, hooks": lambda: step_time_table("capture", "pairs"),
        "growth": growth_table,
        "memory": memory_table,
        "device steps": device_steps_table,
        "device launches": device_launches_table,
        "device others": device_others_table,
    }
    bodies = {}
    out = ["# Tables of the benchmarks\n", "Written by `python benchmarks/report.py` from the CSVs beside this file.\n"]
    for name, make in tables.items():
        rows = make()
        if not rows:
            continue
        body = bodies[name] = table(rows, list(dict.fromkeys(key for row in rows for key in row)))
        title = TASKS[name.removeprefix("task ")].title if name.startswith("task ") else name
        if name != "summary":
            out.append(f"## {title}\n\n{body}\n")
    (RESULTS / "tables.md").write_text("\n".join(out), encoding="utf-8")
    for text in TEXTS:
        text.write_text(fill(text.read_text(encoding="utf-8"), bodies), encoding="utf-8")


if __name__ == "__main__":
    main()
