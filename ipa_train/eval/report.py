"""The page of ``ipa eval``: numbers beside the paper's, curves over the scale, pictures, and how it was all made."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from ipa_train.eval.captions import CaptionedPicture
from ipa_train.eval.html import draw_facts, draw_html, draw_jpeg, draw_tiles
from ipa_train.eval.line_chart import Line, draw_lines
from ipa_train.eval.parts import PICTURES_PER_PART, Parts, Row
from ipa_train.eval.summary import SCORES, AtScale, Mean, Summary, mean_by_picture

PAPER = {
    "IP-Adapter": (0.828, 0.588),
    "SD unCLIP": (0.810, 0.584),
    "Versatile Diffusion": (0.830, 0.587),
    "Open unCLIP": (0.858, 0.608),
    "Kandinsky-2-1": (0.855, 0.599),
    "SD Image Variations": (0.760, 0.548),
    "Uni-ControlNet": (0.736, 0.506),
    "T2I-Adapter (style)": (0.648, 0.485),
    "ControlNet Shuffle": (0.616, 0.421),
}
"""CLIP-I and CLIP-T of Table 1 of arXiv 2308.06721."""
_PAPER_PROTOCOL = (
    "As the authors published them (arXiv 2308.06721, Table 1), and not measured here: 5,000 captioned pictures of "
    "COCO val2017, image prompts alone, 4 samples each, DDIM with 50 steps, guidance 7.5, CLIP ViT-L/14. Their seeds, "
    "resizing and choice of captions were never published, so small differences mean nothing; to compare with "
    "Tencent's adapter, evaluate its file by this same command and add it with --compare."
)
_MEANINGS = {
    "clip_i": "cosine of CLIP's embeddings of picture and image prompt",
    "clip_t": "CLIPScore of picture and caption, 2.5 &times; cosine",
    "dino": "cosine of DINO's class tokens of picture and image prompt",
}
_NUM_SHOWN = 6  # image prompts at each end
_STYLE = """
.theirs td { color: var(--soft); } td.split { padding-top: 16px; white-space: normal; color: var(--soft); }
.four { grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }
.cases { grid-template-columns: repeat(auto-fill, minmax(580px, 1fr)); }
.case { padding: 12px; } .case .row { display: flex; gap: 4px; } .case .row span { flex: 1 1 0; min-width: 0; }
.case img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px; }
.case .row span:first-child { margin-right: 8px; } .case .row span:first-child img { outline: 2px solid var(--amber); }
.case div.caption { margin-top: 8px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.facts td { white-space: normal; overflow-wrap: anywhere; } .facts th { width: 180px; vertical-align: top; }
"""


def draw_report(results: Mapping[Path, Summary], parts: Parts) -> str:
    """The page as HTML of the first of these results, whose parts they are; the others stand beside it, by folder."""
    summary = next(iter(results.values()))
    shown = min(summary.by_scale, key=lambda row: abs(row.scale - 1.0))
    body = [
        f"<h1>{escape(_adapter(summary))}</h1>",
        f"<p>{escape(summary.facts['data_set'].split(' (')[0])}, {summary.facts['num_samples']} samples each, "
        f"{_text(summary)}.</p>",
        draw_tiles(list(_tiles(shown, summary))),
        "<h2>Scores</h2>",
        f"<p>{_explain(shown)}</p>",
        f'<div class="card">{_draw_table(results)}</div>',
    ]
    if len(summary.by_scale) > 1:
        curves = list(_draw_curves(results))
        body += [
            "<h2>Over the scale &lambda;</h2>",
            "<p>From the same seeds at every &lambda;: 0 is the base model without image prompts.</p>",
            f'<div class="grid charts {"four" if len(curves) == 4 else ""}">{"".join(curves)}</div>',
        ]
    body += _draw_cases(parts, shown)
    body += ["<h2>How it was made</h2>", draw_facts(_facts(summary))]
    if summary.left_out:
        listed = "".join(f"<li>{escape(reason)}</li>" for reason in summary.left_out[:50])
        body.append(f"<h2>{len(summary.left_out)} pictures were left out</h2><ul>{listed}</ul>")
    return draw_html(f"ipa eval: {_adapter(summary)}", body, style=_STYLE)


def _adapter(summary: Summary) -> str:
    return str(summary.facts["adapter"].split(" (")[0])


def _text(summary: Summary) -> str:
    return "by image prompt and caption" if summary.facts["text"] == "caption" else "by image prompt alone"


def _tiles(shown: AtScale, summary: Summary) -> Iterator[tuple[str, str]]:
    for name, mean in shown.scores.items():
        spread = "" if mean.ci95 is None else f" &plusmn; {mean.ci95:.3f}"
        yield f"{mean.mean:.3f}", f"{SCORES[name]}{spread} at &lambda; = {shown.scale:g}"
    if shown.distances:
        yield f"{shown.distances.fid:.2f}", f"FID at &lambda; = {shown.scale:g}, over {_network(summary)}"
    yield f"{summary.num_pictures:,}", "image prompts"


def _explain(shown: AtScale) -> str:
    parts = [f"{SCORES[name]}: {_MEANINGS[name]}." for name in shown.scores]
    if parts:
        parts.append("&plusmn; is half of a 95 % interval over image prompts.")
    if shown.distances:
        parts.append("FID falls with the number of pictures: compare it at one number and over one network only.")
    return "<br>".join(parts)


def _network(summary: Summary) -> str:
    network = str(summary.facts["fid_network"])
    return "Inception v3" if network == "inception" else escape(network.rstrip("/").split("/")[-1])


def _draw_table(results: Mapping[Path, Summary]) -> str:
    summary = next(iter(results.values()))
    distances = summary.by_scale[0].distances is not None
    head = ["method", "&lambda;", *SCORES.values()]
    head += [f"{name} over {_network(summary)}" for name in ("FID", "KID &times; 10&sup3;") if distances]
    rows = [_head(head)]
    for folder, result in results.items():
        base = str(result.facts["base"]).rstrip("/").split("/")[-1]
        name = f"<b>{escape(_adapter(result))}</b> <small>{escape(base)}; {escape(folder.name)}</small>"
        rows += [_row([name, f"{row.scale:g}", *_cells(row, distances)]) for row in result.by_scale]
    rows.append(f'<tr class="theirs"><td class="split" colspan="{len(head)}">{_PAPER_PROTOCOL}</td></tr>')
    rest = [""] * (len(head) - 4)
    for name, (clip_i, clip_t) in PAPER.items():
        scale = "1" if name == "IP-Adapter" else ""
        rows.append(_row([f"{name}, as published", scale, f"{clip_i:.3f}", f"{clip_t:.3f}", *rest], "theirs"))
    return f"<table>{''.join(rows)}</table>"


def _head(cells: Sequence[str]) -> str:
    numbers = "".join(f'<th class="number">{cell}</th>' for cell in cells[1:])
    return f"<tr><th>{cells[0]}</th>{numbers}</tr>"


def _row(cells: Sequence[str], kind: str = "") -> str:
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells[1:])
    return f'<tr class="{kind}"><td>{cells[0]}</td>{numbers}</tr>'


def _cells(row: AtScale, distances: bool) -> Iterator[str]:
    for name in SCORES:
        yield _show(row.scores[name]) if name in row.scores else ""
    if distances and row.distances:
        yield f"{row.distances.fid:.2f}"
        yield f"{1e3 * row.distances.kid:.2f} &plusmn; {1e3 * row.distances.kid_std:.2f}"


def _show(mean: Mean) -> str:
    return f"{mean.mean:.3f}" + ("" if mean.ci95 is None else f" <small>&plusmn; {mean.ci95:.3f}</small>")


def _draw_curves(results: Mapping[Path, Summary]) -> Iterator[str]:
    summary = next(iter(results.values()))
    for score in summary.by_scale[0].scores:
        lines = []
        for folder, result in results.items():
            means = [row.scores[score] for row in result.by_scale]
            points = [(row.scale, mean.mean) for row, mean in zip(result.by_scale, means, strict=True)]
            lines.append(Line(folder.name, points, [mean.ci95 or 0.0 for mean in means]))
        yield _card(SCORES[score], lines)
    if summary.by_scale[0].distances:
        lines = [
            Line(folder.name, [(row.scale, row.distances.fid) for row in result.by_scale if row.distances])
            for folder, result in results.items()
        ]
        yield _card(f"FID over {_network(summary)}", lines)


def _card(title: str, lines: Sequence[Line]) -> str:
    return f'<div class="card"><h3>{title}</h3>{draw_lines(lines, x_label="λ")}</div>'


def _draw_cases(parts: Parts, shown: AtScale) -> Iterator[str]:
    """The best and the worst image prompts by the first score, and some that nobody chose."""
    if not shown.scores:
        return
    score = next(iter(shown.scores))
    rows = [row for part in range(parts.count) for row in parts.read(part, score) if row.scale == shown.scale]
    means = mean_by_picture(rows, score)
    ranked = sorted(means, key=lambda id_: (-means[id_], id_))
    order = [picture for picture in parts.pictures if picture.id in means]
    number = min(_NUM_SHOWN, max(1, len(ranked) // 2))
    groups = {
        f"Best by {SCORES[score]}": ranked[:number],
        f"Worst by {SCORES[score]}": ranked[::-1][:number],
        "Not chosen: the first by id": [picture.id for picture in order[:number]],
    }
    for title, ids in groups.items():
        yield f"<h2>{title}</h2><p>Image prompt, then the samples at &lambda; = {shown.scale:g}.</p>"
        yield f'<div class="grid cases">{"".join(_draw_case(parts, id_, shown) for id_ in ids)}</div>'


def _draw_case(parts: Parts, id_: str, shown: AtScale) -> str:
    place = next(i for i, picture in enumerate(parts.pictures) if picture.id == id_)
    picture: CaptionedPicture = parts.pictures[place]
    rows = [row for row in parts.read(place // PICTURES_PER_PART, *SCORES, "thumbnail") if row.id == id_]
    drawn = [row for row in rows if row.scale in (None, shown.scale)][:6]
    images = "".join(f"<span>{draw_jpeg(row.thumbnail, alt=_label(row))}</span>" for row in drawn)
    scores = " &middot; ".join(f"{SCORES[name]} {mean_by_picture(drawn[1:], name)[id_]:.3f}" for name in shown.scores)
    caption = escape(picture.caption)
    return (
        f'<div class="card case"><div class="row">{images}</div><div class="caption" title="{caption}">{caption}</div>'
        f"<small>{scores} &middot; {escape(picture.path.name)}</small></div>"
    )


def _label(row: Row) -> str:
    return "image prompt" if row.seed is None else f"seed {row.seed}"


def _facts(summary: Summary) -> dict[str, object]:
    facts = summary.facts
    return {
        "adapter": facts["adapter"],
        "base": f"{facts['base']}, {facts['dtype']}",
        "image encoder": facts["image_encoder"],
        "data set": f"{facts['data_set']}; {summary.num_pictures:,} scored, {len(summary.left_out):,} left out",
        "text": "caption" if facts["text"] == "caption" else "none: image prompts alone",
        "sampler": f"{summary.sampler}, {facts['num_inference_steps']} steps, guidance {facts['guidance_scale']:g}",
        "size": f"{facts['size']} px" if facts["size"] else "the base's own",
        "seeds": f"{facts['num_samples']} for each image prompt, of its id, the sample's number and --seed "
        f"{facts['seed']}; all are in pictures.parquet",
        "CLIP-I and CLIP-T by": facts["clip"],
        "DINO by": facts["dino"],
        "FID and KID over": "Inception v3 (torch-fidelity)"
        if facts["fid_network"] == "inception"
        else facts["fid_network"],
        "versions": facts["versions"],
    }
