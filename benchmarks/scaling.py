"""How training scales: measured on a few processes here, modelled for 8 to 4,096 GPUs.

    python -m benchmarks.scaling [--out benchmarks/results/scaling.json]

Measured: groups of gloo processes run the real training step of a small SD 1.5 with cached features, all of the same
batch per process, and DDP reduces the real adapter's gradients. Groups take turns; the least of the rounds counts. One
thread per process. The all-reduce's share is the wall time that the same steps take less without it (`no_sync`).
Modelled: everything else, from the assumptions below and estimated step times. Takes a few minutes.
"""

import os
import tempfile
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reporting import facts, finish, parser, table
from benchmarks.scaling_model import RECORDS, RUNS, Cluster, even_buckets
from benchmarks.scaling_ranks import Group

GPUS = (8, 64, 512, 4096)
NICS = (1, 8)
PRECISIONS = {"fp32": 4, "bf16": 2}
BUCKET_MB = (25, 100)
MEASURED, MODELLED = "Measured on this machine", "Modelled, not measured"


def measured(sizes: list[int], settings: dict[str, int], *, num_steps: int, rounds: int) -> dict[str, Any]:
    """By number of processes."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        groups = [Group(size, Path(folder), settings) for size in sizes]
        cases = {
            (group.size, reduced): partial(group.seconds, num_steps, reduced=reduced)
            for group in groups
            for reduced in (True, False)
        }
        least: dict[tuple[int, bool], tuple[float, float]] = {}
        for _ in range(rounds):
            for name, case in cases.items():
                # wall and CPU time each have their own least round
                least[name] = tuple(map(min, case(), least.get(name, (float("inf"),) * 2)))
        for group in groups:
            group.close()
    speeds = {size: size * settings["batch_size"] / least[size, True][0] for size in sizes}
    found = {}
    for group in groups:
        size, (wall, cpu) = group.size, least[group.size, True]
        found[str(size)] = {
            "images_per_second": speeds[size],
            "cpu_seconds_per_step": cpu,
            "efficiency": speeds[size] / (min(size, cores) * speeds[sizes[0]] / sizes[0]),
            "all_reduce_share": 1 - least[size, False][0] / wall,
            **group.traffic,
        }
    return {"cores": cores, "load_at_start": load, "by_processes": found}


def modelled(cluster: Cluster, runs: Any) -> dict[str, Any]:
    """All-reduce, efficiency and data, for each number of GPUs."""
    scaling = []
    for run in runs:
        for precision, width in PRECISIONS.items():
            num_bytes = run.num_parameters * width
            for nics in NICS:
                whole = [cluster.all_reduce(num_bytes, gpus, nics) for gpus in GPUS]
                row = {
                    "run": run.name,
                    "step_seconds": run.step_seconds,
                    "gradients": precision,
                    "gradient_bytes": num_bytes,
                    "nics_per_node": nics,
                    "all_reduce_ms": [1e3 * seconds for seconds in whole],
                    "exposed": [
                        cluster.efficiency(run.step_seconds, seconds, gpus)
                        for seconds, gpus in zip(whole, GPUS, strict=True)
                    ],
                }
                for cap in BUCKET_MB:
                    # DDP fills buckets with fp32 gradients; a hook makes each smaller afterwards
                    full = even_buckets(run.num_parameters * PRECISIONS["fp32"], cap * 2**20)
                    buckets = [size * width / PRECISIONS["fp32"] for size in full]
                    row[f"overlapped, {cap} MiB buckets"] = [
                        cluster.efficiency(
                            run.step_seconds, cluster.exposed(buckets, run.step_seconds, gpus, nics), gpus
                        )
                        for gpus in GPUS
                    ]
                scaling.append(row)
    data = []
    for record in RECORDS:
        gpu = record.num_bytes * record.images_per_second
        data.append(
            asdict(record)
            | {"gpu_bytes_per_s": gpu, "node_bytes_per_s": gpu * cluster.gpus_per_node}
            | {"total_bytes_per_s": [gpu * gpus for gpus in GPUS]}
        )
    return {"assumptions": asdict(cluster), "gpus": list(GPUS), "scaling": scaling, "data": data}


def markdown(figures: Any) -> str:
    here, model = figures["measured"], figures["modelled"]
    rows = []
    for size, found in here["by_processes"].items():
        rows.append(
            [
                size,
                f"{found['images_per_second']:.2f}",
                f"{found['cpu_seconds_per_step']:.2f}",
                f"{found['efficiency']:.0%}",
                f"{found['all_reduce_share']:.0%}",
                f"{sum(found['bucket_bytes']):,}",
                ", ".join(f"{count} {name.removeprefix('gloo:')}" for name, count in found["collectives"].items()),
            ]
        )
    text = (
        f"{MEASURED}: {here['cores']} cores, load average {here['load_at_start']:.1f} at the start; "
        "efficiency is against min(processes, cores) single processes.\n\n"
    )
    header = ["processes", "images/s", "CPU s per step of one", "efficiency", "all-reduce", "bytes reduced per step"]
    text += table([*header, "collectives per step"], rows)
    text += f"\n{MODELLED}, from estimated step times of one H200 and these assumptions:\n\n"
    sources = [(f.name, model["assumptions"][f.name], f.metadata["help"].replace("%%", "%")) for f in fields(Cluster)]
    text += table(["assumption", "value", "what it is"], sources)
    gpus = " / ".join(f"{count:,}" for count in model["gpus"])
    overlapped = [f"overlapped, {cap} MiB buckets" for cap in BUCKET_MB]
    rows = []
    for row in model["scaling"]:
        name = f"{row['run']} ({1e3 * row['step_seconds']:.0f} ms)"
        efficiencies = [" / ".join(f"{100 * x:.1f}" for x in row[key]) for key in ("exposed", *overlapped)]
        times = " / ".join(f"{x:.1f}" for x in row["all_reduce_ms"])
        size = f"{row['gradients']}, {row['gradient_bytes'] / 1e6:.0f} MB"
        rows.append([name, size, row["nics_per_node"], times, *efficiencies])
    text += f"\n{MODELLED}: {gpus} GPUs, efficiency in percent against as many single GPUs.\n\n"
    text += table(["run", "gradients", "NICs per node", "all-reduce ms", "not overlapped", *overlapped], rows)
    rows = []
    for row in model["data"]:
        total = " / ".join(f"{x / 1e9:.2f}" for x in row["total_bytes_per_s"])
        speeds = [f"{row[f'{unit}_bytes_per_s'] / 1e6:.1f}" for unit in ("gpu", "node")]
        rows.append([row["name"], f"{row['num_bytes']:,}", row["images_per_second"], *speeds, total])
    text += f"\n{MODELLED}: what is read.\n\n"
    return text + table(["record", "bytes", "images/s per GPU", "MB/s per GPU", "per node", f"GB/s at {gpus}"], rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="of each group, least first")
    arguments.add_argument("--width", type=int, default=80, help="channels of the UNet's top (320 in SD 1.5)")
    arguments.add_argument("--latent-size", type=int, default=32)
    arguments.add_argument("--batch-size", type=int, default=2, help="of one process; default: 2")
    arguments.add_argument("--steps", type=int, default=3, help="of a group, in a round; default: 3")
    arguments.add_argument(
        "--step-seconds",
        type=float,
        nargs=len(RUNS),
        default=[run.step_seconds for run in RUNS],
        help=f"measured ones in place of the estimates, of: {'; '.join(run.name for run in RUNS)}",
    )
    for option in fields(Cluster):
        flag = "--" + option.name.replace("_", "-")
        kind = type(option.default)
        arguments.add_argument(
            flag, type=kind, default=option.default, help=f"{option.metadata['help']}; default: {option.default}"
        )
    args = arguments.parse_args()
    cluster = Cluster(**{option.name: getattr(args, option.name) for option in fields(Cluster)})
    runs = [replace(run, step_seconds=seconds) for run, seconds in zip(RUNS, args.step_seconds, strict=True)]
    settings = {"width": args.width, "latent_size": args.latent_size, "batch_size": args.batch_size}
    figures = {
        **facts(("diffusers",)),
        "settings": {**settings, "steps": args.steps, "rounds": args.rounds},
        "measured": measured(sorted(args.processes), settings, num_steps=args.steps, rounds=args.rounds),
        "modelled": modelled(cluster, runs),
    }
    finish(figures, markdown(figures), args.out)


if __name__ == "__main__":
    main()
