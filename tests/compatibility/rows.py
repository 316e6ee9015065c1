"""Every base, variant and image encoder that is claimed to work, and the table in the docs that says so."""

from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs" / "compatibility.md"
_BEGIN, _END = "<!-- rows: make compatibility -->\n", "<!-- end -->"
_LOADERS = ["diffusers", "ComfyUI_IPAdapter_plus", "Tencent ip_adapter"]


@dataclass(frozen=True)
class Row:
    """A combination, by the names of its config groups."""

    base: str
    adapter: str
    image_encoder: str

    def __str__(self) -> str:
        return f"{self.base}-{self.adapter}-{self.image_encoder}"


ROWS = [
    *(Row("sd15", adapter, "vit_h") for adapter in ("linear", "plus", "full")),
    *(Row("sd15", adapter, "stored") for adapter in ("linear", "faceid", "faceid_portrait")),
    *(Row("sd15", adapter, "face") for adapter in ("faceid_plus", "faceid_plus_v2")),
    *(Row("sd15", adapter, "dinov2_large") for adapter in ("linear", "plus")),
    *(Row("sd15", "plus", encoder) for encoder in ("vit_l", "dinov3_large", "siglip_so400m", "siglip2_so400m")),
    *(Row("sd21", adapter, "vit_h") for adapter in ("linear", "plus", "full")),
    *(Row("sdxl", "linear", encoder) for encoder in ("big_g", "vit_h", "siglip_so400m")),
    *(Row("sdxl", adapter, "vit_h") for adapter in ("plus", "full")),
    Row("sdxl", "faceid", "stored"),
    Row("sdxl", "faceid_plus_v2", "face"),
    *(Row(base, "sd3", "siglip_so400m") for base in ("sd3", "sd35_medium")),
    *(Row(base, "linear", "vit_l") for base in ("flux_dev", "flux_schnell")),
]
BASELINES = [Row("sd15", adapter, "vit_h") for adapter in ("simple", "finetune")]


@dataclass(frozen=True)
class Finding:
    """What was found of a row: who loads the file at the official sizes, and how far the denoisers are apart."""

    row: Row
    num_parameters: int
    """That are trained, at the official sizes."""
    verdicts: dict[str, str]
    error: float | None
    """Relative; None for a baseline, which has no file."""

    def cells(self) -> list[str]:
        """One line of the table, but for the error."""
        exported = "no file" if self.error is None else "yes"
        loaders = [self.verdicts.get(loader, "no") for loader in _LOADERS]
        names = [self.row.base, self.row.adapter, self.row.image_encoder]
        return [*names, f"{self.num_parameters:,}", "yes", "yes", exported, *loaders]


def write_table(findings: list[Finding]) -> None:
    """Put the findings into the docs, in the order of ROWS."""
    head = [
        "base",
        "adapter",
        "image_encoder",
        "trained parameters",
        "trains",
        "resumes",
        "exports",
        *_LOADERS,
        "error",
    ]
    lines = [head, ["---"] * len(head)]
    for finding in sorted(findings, key=lambda f: [*ROWS, *BASELINES].index(f.row)):
        lines.append([*finding.cells(), "" if finding.error is None else f"{finding.error:.0g}"])
    text = TABLE.read_text()
    before, rest = text.split(_BEGIN)
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    TABLE.write_text(before + _BEGIN + table + _END + rest.split(_END)[1])


def table_rows() -> list[list[str]]:
    """The cells of the table in the docs, line by line."""
    table = TABLE.read_text().split(_BEGIN)[1].split(_END)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
