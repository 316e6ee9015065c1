"""Imports point one way: a layer may import what stands before it, never what stands after."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Layers of one row do not import each other, except that data sources and bases may use what stands in earlier rows.
ORDER = [
    {"errors", "version"},
    {"runtime"},
    {"adapter", "diffusion"},
    {"conditioning", "bases", "data"},
    {"acceleration"},
    {"export"},
    {"eval"},
    {"training"},
    {"cli"},
]
RANK = {layer: rank for rank, row in enumerate(ORDER) for layer in row}
# Where a library may be imported; deepspeed and wandb are reached through Lightning alone.
HOMES = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "lightning": {"training", "cli", "data/datamodule.py"},
    "webdataset": {"data", "data_tools"},
    "diffusers": {"bases", "export", "eval"},
    "transformers": {"bases", "conditioning", "eval"},
    "torchmetrics": {"eval"},
    "gradio": {"cli"},
    "deepspeed": set(),
    "wandb": set(),
}
FILES = sorted((ROOT / "ipa_train").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    inside = path.relative_to(ROOT / "ipa_train")
    layer = inside.parts[0].removesuffix(".py")
    for module in imports(path):
        package, _, rest = module.partition(".")
        if package == "ipa_train" and layer != "__init__":
            other = rest.split(".")[0]
            assert other == layer or RANK[other] < RANK[layer], f"{inside} imports {module}"
        if package in HOMES:
            assert {layer, str(inside)} & HOMES[package], f"{inside} imports {package}"


@pytest.mark.parametrize("path", sorted((ROOT / "data_tools").glob("*.py")), ids=lambda p: p.name)
def test_tools_know_neither_training_nor_the_command_line(path):
    for module in imports(path):
        assert not module.startswith(("ipa_train.training", "ipa_train.cli")), f"{path.name} imports {module}"
        package = module.partition(".")[0]
        assert package not in HOMES or "data_tools" in HOMES[package], f"{path.name} imports {package}"


def test_every_layer_has_its_place():
    layers = {p.name.removesuffix(".py") for p in (ROOT / "ipa_train").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert {name for name in layers if not name.startswith("__") and name != "py"} - {"py.typed"} == set(RANK)
