"""The training step against that of IP-Adapter's tutorials, each change in turn, measured side by side.

    python -m benchmarks.step [--base sd15] [--variant linear] [--out benchmarks/results/step_sd15.json]

First both compute loss and gradients of one batch (of up to 256 pixels): where they differ by more than rounding,
nothing is timed. Then the cases take turns, and the least of the rounds counts: CPU time of one thread on a CPU, wall
time on a GPU. Models have released sizes and random weights. A "+" adds a change to the line above it; the first batch
size has all lines, others the ends alone. Peak memory is that of two steps in a process of their own. Beside UNets
there is no tutorial: the reference is our own step with fp32 weights under autocast, its loss printed at every step.
"""

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import VARIANTS, OurStep, Setting, make_reference, make_training
from benchmarks.costs import Matmul, count, seconds
from benchmarks.equality import Equality, require_equal
from benchmarks.ladder import OURS, REFERENCE, Case, make_cases
from benchmarks.reporting import facts, finish, measure, parser, table
from benchmarks.sizes import SIZES
from benchmarks.step_memory import CASES, peak_gib
from ipa_train.acceleration.compilation import require_compilers
from ipa_train.errors import ConfigError

MATMUL = "matrix product"
OUT_OF_MEMORY = "out of memory"
_CHECKED_RESOLUTION, _CHECKED_PIXELS = 256, 4 * 256**2  # pixels of all pictures: over few, rounding differs much


def run_cases(cases: Mapping[str, Case], device: str, *, rounds: int, num_steps: int) -> dict[str, Any]:
    """Cost of each case, or that memory did not suffice for it."""
    fitting = {name: case for name, case in cases.items() if _fits(case)}
    counts = {name: count(_ready(case)) for name, case in fitting.items() if case.counted_as is None}
    product = Matmul(device)
    timed = {name: partial(_seconds, case, device, num_steps) for name, case in fitting.items()}
    found = measure({**timed, MATMUL: partial(seconds, product, device, num_steps)}, rounds=rounds)
    peak = product.flops / found.pop(MATMUL)
    figures: dict[str, Any] = dict.fromkeys(cases, OUT_OF_MEMORY)
    for name, time in found.items():
        operations, flops = counts.get(cases[name].counted_as or name, (None, None))
        figures[name] = {
            "seconds": time,
            "times_reference": found[REFERENCE] / time if REFERENCE in found else None,
            "operations": operations if name in counts else None,
            "tflops": flops and flops / time / 1e12,
            "share_of_matmul": flops and flops / time / peak,
        }
    return {"matmul_tflops": peak / 1e12, "cases": figures}


def largest_batch(cases_of: Callable[[int], Mapping[str, Case]], name: str, *, first: int, up_to: int) -> int:
    """The largest batch size of a case that fits, found by doubling; 0 where not even the first does."""
    size = first
    while size <= up_to and _fits(cases_of(size)[name]):
        size *= 2
    return size // 2 if size > first else 0


def _ready(case: Case) -> Callable[[], None]:
    case.prepare()
    return case.step


def _seconds(case: Case, device: str, num_steps: int) -> float:
    return seconds(_ready(case), device, num_steps)


def _fits(case: Case) -> bool:
    """Whether memory suffices for a step, by running it."""
    try:
        _ready(case)()
    except torch.OutOfMemoryError:
        fits = False
    else:
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def markdown(figures: Any) -> str:
    settings = figures["settings"]
    text = f"{settings['base']}, {settings['variant']}, {settings['resolution']} pixels, on {settings['device_name']}."
    text += f"\n\n{Equality(**figures['equality'])}\n"
    for size, found in figures.get("batches", {}).items():
        rows = [[name, *_cells(case, int(size))] for name, case in found["cases"].items()]
        share = f"of the {found['matmul_tflops']:.3g} of a matrix product"
        header = [f"batch {size}", "s per step", "images/s", "times the reference", "operations", "TFLOP/s", share]
        text += f"\n{table(header, rows)}"
    for key, title in (("peak_gib", "peak memory, GiB"), ("largest_batches", "largest batch that fits, by doubling")):
        if key in figures:
            rows = [[case, f"{x:.3g}" if x else OUT_OF_MEMORY] for case, x in figures[key].items()]
            text += f"\n{table(['', title], rows)}"
    return text


def _cells(case: Any, batch_size: int) -> list[str]:
    if case == OUT_OF_MEMORY:
        return [OUT_OF_MEMORY, *[""] * 5]
    cells = [
        (case["seconds"], ".3g"),
        (batch_size / case["seconds"], ".3g"),
        (case["times_reference"], ".2f"),
        (case["operations"], ",d"),
        (case["tflops"], ".3g"),
        (case["share_of_matmul"], ".0%"),
    ]
    return ["" if value is None else format(value, form) for value, form in cells]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; compilation is left out, and said to be, where there is no compiler."""
    arguments = parser(__doc__)
    arguments.add_argument("--base", choices=SIZES, default="small", help="default: small")
    arguments.add_argument("--variant", choices=VARIANTS, help="default: linear, and for sd3 its own")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    arguments.add_argument("--resolution", type=int, help="in pixels; default: what the base is trained at")
    arguments.add_argument("--batch", type=int, nargs="+", default=[4], help="sizes; default: 4")
    arguments.add_argument(
        "--up-to", type=int, metavar="BATCH", help="double the first size until memory is full, or up to this one"
    )
    arguments.add_argument("--steps", type=int, default=1, help="of a case, in a round; default: 1")
    arguments.add_argument("--compile", choices=("none", "blocks", "whole"), default="blocks", help="default: blocks")
    arguments.add_argument("--verify-only", action="store_true", help="compare loss and gradients, and stop")
    args = arguments.parse_args(argv)
    args.variant = args.variant or ("sd3" if args.base == "sd3" else "linear")
    args.resolution = args.resolution or SIZES[args.base].resolution
    if args.compile != "none":
        try:
            require_compilers()
        except ConfigError as error:
            print(f"Without compilation. {error}", flush=True)
            args.compile = "none"
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    setting = Setting(args.base, args.variant, args.resolution, args.device)
    checked = replace(setting, resolution=min(args.resolution, _CHECKED_RESOLUTION))
    on_gpu = args.device == "cuda"
    figures: dict[str, Any] = {
        **facts(("diffusers",)),
        "settings": {
            **{name: value for name, value in vars(args).items() if name not in ("work", "out", "verify_only")},
            "device_name": torch.cuda.get_device_name() if on_gpu else "one thread of a CPU",
        },
        "equality": asdict(require_equal(checked, _CHECKED_PIXELS // checked.resolution**2)),
    }
    if not args.verify_only:
        figures |= measured(setting, args)
    finish(figures, markdown(figures), args.out)


def measured(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Memory, then time at each batch size."""
    first = args.batch[0]
    peaks = {case: peak_gib(setting, case, first) for case in CASES}
    ours, reference = OurStep(make_training(setting)), make_reference(setting)
    cases_of = partial(make_cases, setting, ours, reference)
    largest = {}
    if args.up_to:
        ends = partial(cases_of, compiled="none", every_rung=False)
        largest = {name: largest_batch(ends, name, first=first, up_to=args.up_to) for name in (REFERENCE, OURS)}
    batches = {}
    for size in dict.fromkeys([*args.batch, *filter(None, largest.values())]):
        torch.compiler.reset()  # or the second size would be compiled for any size
        cases = cases_of(size, compiled=args.compile, every_rung=size == first)
        batches[str(size)] = run_cases(cases, setting.device, rounds=args.rounds, num_steps=args.steps)
    return {"peak_gib": peaks, "batches": batches} | ({"largest_batches": largest} if largest else {})


if __name__ == "__main__":
    main()
