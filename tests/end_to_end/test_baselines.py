"""The paper's baselines through the whole command: they train, resume to the bit, and are no adapter files."""

import pytest
import torch
from safetensors.torch import load_file

from ipa_train.cli.main import main
from tests.end_to_end.conftest import loss_curve


def checkpoint(run):
    return sorted((run / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize("variant", ["simple", "finetune"])
def test_resumed_they_are_bit_equal(variant, train_command, tmp_path, capfd):
    option = f"adapter={variant}"
    for name, max_steps in (("whole", 4), ("parts", 1), ("parts", 4)):
        assert main(train_command(name, option, f"trainer.max_steps={max_steps}")) == 0
    assert capfd.readouterr().err.count("hold no export") == 3
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    for file in ("adapter.safetensors", "ema.safetensors"):
        whole, parts = (load_file(checkpoint(tmp_path / name) / file) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list(checkpoint(tmp_path / "whole").glob("ip_adapter*"))
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "exported")]) != 0
    assert "there is nothing to export: " in capfd.readouterr().err
    assert not (tmp_path / "exported").exists()
    assert main(["check", *train_command("checked", option)[1:]]) == 0
    assert "no loader will take it: " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["adapter=finetune", "base.dtype=bfloat16"], "adapter.train_denoiser=true needs base.dtype=float32"),
        (["adapter=simple", "adapter.sites.attention=both"], "give decoupled, concatenated, image_only"),
        (["adapter=faceid", "adapter.sites.lora_rank=-1"], "adapter.sites.lora_rank must be at least 0"),
        (["adapter=faceid", "adapter.sites.lora_rang=4"], "lora_rang"),
    ],
)
def test_mistakes_are_one_line(options, complaint, train_command, tmp_path, capfd):
    assert main(train_command("run", *options)) != 0
    shown = capfd.readouterr().err.strip().splitlines()
    assert complaint in shown[-1]
    assert "Traceback" not in "".join(shown)
    assert not (tmp_path / "run").exists()
