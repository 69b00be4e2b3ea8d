"""Write benchmarks/README.md: tables of the results in benchmarks/results, ratios first; missing results are named.

python benchmarks/tables.py [--results FOLDER --output FILE]
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
INTRODUCTION = """# Benchmarks

Each script compares this project with the alternatives in the same run, on the same towers and data, and writes
raw results to `results/`. `python benchmarks/tables.py` makes this page from them.

```
pip install -r benchmarks/requirements.txt
python benchmarks/step.py            # one optimizer step; --subject vit-b-32 and others, --compile
python benchmarks/savings.py         # ways to recompute less
python benchmarks/loss.py            # only losses and their gradients
python benchmarks/profile_step.py    # profile of a step
python benchmarks/memory.py          # peak memory against the batch; makes docs/memory.png
python benchmarks/loader.py --images FOLDER
bash benchmarks/gpu.sh               # smoke checks and the main measurements on one GPU
```

`gpu.sh` needs no network. If the machine lacks the small packages, put their wheels into a folder first:
`pip download --no-deps --dest wheels webdataset braceexpand tyro docstring-parser typeguard`, then
`WHEELS=wheels bash benchmarks/gpu.sh`. `--toy` runs all stages in a minute on a CPU, as a test.

Ratios compare medians of alternating steps. Memory is the peak of torch's allocations above those before
the step; in the table against the batch it is the resident memory of a process. The floor is plain gradient
accumulation over the chunks without shared negatives: every pair runs once. No method that shares negatives
over more pairs than fit into memory can be faster.
"""
WAYS = {
    "ours": "ours",
    "ours_kept": "ours, graphs kept",
    "open_clip": "open_clip --accum-freq",
    "sentence_transformers": "sentence-transformers",
}


@dataclass(frozen=True)
class Settings:
    """Input and output files."""

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
    on_a_gpu = read("gpu.json")
    parts.append("## On a GPU\n")
    parts += map(gpu_section, on_a_gpu) if on_a_gpu else ["Not measured yet. `bash benchmarks/gpu.sh` measures it.\n"]
    settings.output.write_text("\n".join(parts))


def step_section(found: dict) -> str:
    """Time over the floor's, memory of every way, open_clip over ours, pairs a second, share of the matrix rate."""
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
        f"`{found['subject']}`{compiled}, {found['machine']}, medians of {found['repeats']}. Columns with a method's "
        "name are its time divided by the floor's. The matrix rate was "
        f"{found['matrix_flops_per_second'] / 1e12:.2f} Tflop/s; its share counts "
        "one forward and one backward pass of each pair."
    )
    return f"{words}\n\n{table(head, rows)}"


def savings_section(found: dict) -> str:
    """Time of every way over the floor's; for frozen towers over the floor with the same frozen towers."""
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
        f"{found['machine']}, medians of {found['repeats']}; value and all gradients. A memory bank of N pairs "
        "needs three blocks of N x N logits instead of one."
    )
    return f"{words}\n\n{table(head, rows)}"


def profile_section(found: dict) -> str:
    """Shares of the step, and the slowest operations."""
    words = (
        f"`{found['subject']}`, N = {found['effective_batch']:,}, C = {found['chunk_size']}, {found['machine']}; one "
        f"step of {found['seconds']:.2f} s in torch.profiler. One process: no communication."
    )
    parts = table(["phase", "share"], [[name, f"{share:.1%}"] for name, share in found["shares"].items()])
    first = found["shares"]["towers, pass 1"]
    left = f"\nRemaining overhead: pass 1 ({first:.0%}), removed by `--keep-graphs`, and the loss.\n"
    operations = table(["operation", "share"], [[f"`{k}`", f"{share:.1%}"] for k, share in found["largest"].items()])
    return f"{words}\n\n{parts}{left}\n{operations}"


def gpu_section(found: dict) -> str:
    """Main steps, ratios to peers and to the floor, losses, the loader, and failures."""
    stages = found["stages"]
    parts = [f"{found['machine']}; {found['seconds']:.0f} s for all stages, one run each.\n"]
    parts += [gpu_steps(stages), gpu_ways(stages)]
    loader = stages.get("loader", {})
    if "images_per_second" in loader:
        parts.append(
            f"The loader decodes {loader['images_per_second']:,.0f} photographs a second of "
            f"{' x '.join(map(str, loader['side']))} pixels with {loader['workers']} workers; "
            f"{loader['ready_after_them']:.0%} of a step of {loader['images']:,} are ready after the "
            f"{loader['compute_seconds']:.1f} s that the model computes.\n"
        )
    failed = {name: stage.get("error") or stage.get("out_of_memory") for name, stage in stages.items()}
    return "\n".join(parts + [f"{name}: {reason}\n" for name, reason in failed.items() if reason])


def gpu_steps(stages: dict) -> str:
    """All whole steps, with share of the matrix rate and memory."""
    rows = []
    for name, stage in stages.items():
        if name.startswith(("step ", "floor ", "24 GB ")) and "seconds" in stage:
            shares = [stage["share_of_matrix_rate"], stage["share_with_pass_1"]]
            memory = [stage.get("peak_allocated_bytes"), stage.get("peak_reserved_bytes")]
            rows.append(
                [name.removeprefix("step "), stage.get("effective_batch", ""), stage["chunk_size"]]
                + [f"{stage['seconds']:.2f} s", f"{stage['pairs_per_second']:,.0f}"]
                + [f"{share:.0%}" if share else "" for share in shares]
                + [gibibytes(count) for count in memory]
            )
    head = ["step", "N and Q", "C", "time", "pairs/s", "share of matrix rate", "with pass 1", "GiB allocated"]
    return table([*head, "GiB reserved"], rows)


def gpu_ways(stages: dict) -> str:
    """Alternating ways of each stage, over the first way."""
    rows = []
    for name, stage in stages.items():
        ways = stage.get("ways", {})
        for way, result in ways.items():
            first = next(iter(ways.values()))
            time = f"{result['seconds']:.3f} s" if "seconds" in result else result["out_of_memory"]
            ratio = over(result, first) if "seconds" in result and "seconds" in first else ""
            rows.append([name, way, time, ratio, gibibytes(result.get("peak_bytes"))])
    return table(["stage", "way", "time", "over the first", "GiB"], rows)


def gibibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f}"


def memory_section(found: dict) -> str:
    """Memory of the cached step and of plain autograd."""
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
    """Ratio of times; empty if one was not measured."""
    return f"{way['seconds'] / other['seconds']:.2f}" if way and other else ""


def mebibytes(way: dict | None) -> str:
    return f"{way['peak_bytes'] / 2**20:,.0f}" if way else ""


def table(head: Iterable, rows: Iterable[Iterable]) -> str:
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
