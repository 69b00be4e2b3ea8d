"""Writes benchmarks/README.md: tables of what lies in benchmarks/results, ratios first; what is missing is said to be.

python benchmarks/tables.py [--results FOLDER --output FILE]
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
INTRODUCTION = """# Benchmarks

Each script measures ours beside what a user would use instead, in the same run, on the same towers and data, and keeps
its raw figures in `results/`. `python benchmarks/tables.py` makes this page of them.

```
pip install -r benchmarks/requirements.txt
python benchmarks/step.py            # one optimizer step; --subject vit-b-32 and others, --compile
python benchmarks/savings.py         # what each way of less recomputation gives
python benchmarks/loss.py            # losses and gradients alone
python benchmarks/profile_step.py    # where the time of a step goes
python benchmarks/memory.py          # peak memory against the batch; makes docs/memory.png
python benchmarks/loader.py --images FOLDER
bash benchmarks/gpu.sh               # all of it on one GPU; --toy: a minute on a CPU, to see that it runs
```

Ratios are of medians of steps that took turns. Memory is the peak of what torch allocated above what was held before
the step, but the resident memory of a process in the table against the batch. The floor is
plain accumulation over the chunks without shared negatives: every pair runs once, and no method that shares negatives
over more pairs than fit can do less.
"""
WAYS = {
    "ours": "ours",
    "ours_kept": "ours, graphs kept",
    "chunk_by_chunk": "ours, pass 1 chunk by chunk",
    "open_clip": "open_clip --accum-freq",
    "sentence_transformers": "sentence-transformers",
}


@dataclass(frozen=True)
class Settings:
    """Where the figures are and where the page goes."""

    results: Path = HERE / "results"
    """Folder of the scripts' JSON files."""
    output: Path = HERE / "README.md"
    """The page."""


def main(settings: Settings) -> None:
    read = lambda pattern: [json.loads(file.read_text()) for file in sorted(settings.results.glob(pattern))]  # noqa: E731
    parts = [INTRODUCTION]
    for title, pattern, section in (
        ("One optimizer step", "step_*.json", step_section),
        ("Less recomputation", "savings*.json", savings_section),
        ("Losses alone", "loss.json", loss_section),
        ("Where the time goes", "profile_*.json", profile_section),
        ("Peak memory against the batch", "memory.json", memory_section),
        ("Images a second, one core", "loader.json", loader_section),
    ):
        found = read(pattern)
        parts += [f"## {title}\n", *map(section, found)] if found else [f"## {title}\n", "Not measured.\n"]
    if not any("vit" in each["subject"] for each in read("step_*.json")):
        parts.append("## On a GPU\n\nNot measured: no GPU was at hand. `bash benchmarks/gpu.sh` measures it.\n")
    settings.output.write_text("\n".join(parts))


def step_section(found: dict) -> str:
    """Time over the floor's and memory of every way; open_clip over ours; pairs a second and share of the peak."""
    rows, measured = [], [name for name in WAYS if any(name in row["ways"] for row in found["rows"])]
    for row in found["rows"]:
        ways = row["ways"]
        floor, ours = ways["plain"], ways["ours"]
        rows.append(
            [f"{row['effective_batch']:,}", row["chunk_size"]]
            + [over(ways.get(name), floor) for name in measured]
            + [over(ways.get("open_clip"), ours), f"{floor['seconds']:.2f} s", row["graphs_kept"]]
            + [mebibytes(floor), mebibytes(ours), mebibytes(ways.get("open_clip"))]
            + [f"{row['effective_batch'] / ours['seconds']:,.0f}", f"{row['share_of_matrix_rate']:.0%}"]
        )
    head = ["N", "C", *(WAYS[name] for name in measured), "open_clip / ours", "floor", "graphs kept"]
    head += ["MiB floor", "MiB ours", "MiB open_clip", "pairs/s", "share of matrix rate"]
    compiled = ", compiled" if found["compile"] else ""
    words = (
        f"`{found['subject']}`{compiled}, {found['machine']}, medians of {found['repeats']}. Columns with a way's name "
        f"are its time over the floor's. The matrix rate was {found['matrix_flops_per_second'] / 1e12:.2f} Tflop/s; "
        "its share counts each pair once forward and backward."
    )
    return f"{words}\n\n{table(head, rows)}{largest_batch(found)}"


def largest_batch(found: dict, budget: float = 24 * 2**30) -> str:
    """On a GPU: the largest batch within 24 GB, by the line through the smallest and the largest batch measured."""
    first, last = found["rows"][0], found["rows"][-1]
    if "vit" not in found["subject"] or first["effective_batch"] == last["effective_batch"]:
        return ""
    (n1, b1), (n2, b2) = ((row["effective_batch"], row["ways"]["ours"]["peak_bytes"]) for row in (first, last))
    slope = max((b2 - b1) / (n2 - n1), 1)
    state = 12 * found["parameters"]  # weights and moments, which lie there before the step
    return (
        f"\nWithin 24 GB of device memory: N about {n1 + (budget - b1 - state) / slope:,.0f}, by these figures' line.\n"
    )


def savings_section(found: dict) -> str:
    """Every way's time over the floor's, the frozen one over the floor of the same frozen towers."""
    ways = found["ways"]
    rows = []
    for name, way in ways.items():
        if not name.startswith("floor"):
            floor = ways["floor, image trunk frozen" if "frozen" in name else "floor"]
            rows.append([name, over(way, floor), f"{way['seconds']:.2f} s", mebibytes(way)])
    words = f"`{found['subject']}`, N = {found['effective_batch']:,}, C = {found['chunk_size']}, {found['machine']}."
    return f"{words}\n\n{table(['a step with', 'time / floor', 'time', 'MiB'], rows)}"


def loss_section(found: dict) -> str:
    """Ours over open_clip's in time and memory, and with groups and memory over the plain one."""
    rows = []
    for row in found["rows"]:
        ways = row["ways"]
        ours, peer = ways["ours"], ways.get("open_clip")
        memory = f"{ours['peak_bytes'] / peer['peak_bytes']:.3f}" if peer else ""
        rows.append(
            [row["loss"], f"{row['pairs']:,}", row["dimension"], over(ours, peer), memory]
            + [over(ours, ways.get("autograd"))]
            + [over(ways.get(name), ours) for name in ("ours_groups", "ours_memory", "ours_groups_memory")]
            + [f"{ours['seconds']:.2f} s", mebibytes(ours), mebibytes(peer)]
        )
    head = ["loss", "N", "D", "time / open_clip", "memory / open_clip", "time / autograd"]
    head += ["groups / ours", "memory of N / ours", "both / ours", "ours", "MiB ours", "MiB open_clip"]
    words = (
        f"{found['machine']}, medians of {found['repeats']}; value and all gradients. A memory of N pairs makes three "
        "blocks of N x N logits of one."
    )
    return f"{words}\n\n{table(head, rows)}"


def profile_section(found: dict) -> str:
    """Shares of the step, and the operations that take most."""
    words = (
        f"`{found['subject']}`, N = {found['effective_batch']:,}, C = {found['chunk_size']}, {found['machine']}; one "
        f"step of {found['seconds']:.2f} s in torch.profiler. One process: no communication."
    )
    parts = table(["part", "share"], [[name, f"{share:.1%}"] for name, share in found["shares"].items()])
    first = found["shares"]["towers, pass 1"]
    left = f"\nLeft to win: pass 1 ({first:.0%}), which kept graphs take away, and the loss; the rest is the floor.\n"
    operations = table(["operation", "share"], [[f"`{k}`", f"{share:.1%}"] for k, share in found["largest"].items()])
    return f"{words}\n\n{parts}{left}\n{operations}"


def memory_section(found: dict) -> str:
    """The cached step's and plain autograd's."""
    bytes_of = lambda row, way: f"{row[way]['bytes'] / 2**20:,.0f}" if way in row else ""  # noqa: E731
    rows = [[f"{row['effective_batch']:,}", bytes_of(row, "cached"), bytes_of(row, "plain")] for row in found["rows"]]
    words = f"The `tiny` CLIP preset, chunks of {found['chunk_size']}, {found['machine']}."
    return f"{words}\n\n{table(['N', 'MiB cached step', 'MiB plain autograd'], rows)}"


def loader_section(found: dict) -> str:
    """Ours over open_clip's transform."""
    rows = []
    for name, result in found["results"].items():
        ratios = [result["ratio"][way] for way in ("light", "light_host", "none")]
        rows.append([name, *ratios, result["images_per_second"]["open_clip"]])
    head = ["photographs", "light / open_clip", "light, normalized on the host", "none", "open_clip, images/s"]
    return f"{found['machine']}, {found['size']} px, medians of {found['repeats']}.\n\n{table(head, rows)}"


def over(way: dict | None, other: dict | None) -> str:
    """Ratio of times, or nothing where either was not measured."""
    return f"{way['seconds'] / other['seconds']:.2f}" if way and other else ""


def mebibytes(way: dict | None) -> str:
    return f"{way['peak_bytes'] / 2**20:,.0f}" if way else ""


def table(head: Iterable, rows: Iterable[Iterable]) -> str:
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
