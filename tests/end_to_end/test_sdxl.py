"""SDXL from shards to a cache, a run that resumes, a grid and an export; with a VAE of its own."""

from ipa_train.bases.tiny import tiny_vae
from ipa_train.cli.main import main
from tests.end_to_end.conftest import loss_curve


def test_a_run_from_a_cache_of_another_vae_resumes(train_command, tiny_sdxl, tmp_path, capfd):
    tiny_vae(seed=5).save_pretrained(tmp_path / "vae")
    base = ["base=sdxl", f"base.path={tiny_sdxl[0]}", f"base.vae_path={tmp_path / 'vae'}"]
    base += ["callbacks.sample_grid.num_images=2", "callbacks.sample_grid.num_inference_steps=1"]
    cache = tmp_path / "cache"
    overrides = [o for o in train_command("unused")[1:] if not o.startswith("run.")]
    assert main(["data", "encode", *overrides, *base, "--out", str(cache)]) == 0
    base += [f"data.shards={cache}", "callbacks.sample_grid.every_steps=2"]
    assert main(train_command("whole", *base, "trainer.max_steps=2")) == 0
    for max_steps in (1, 2):
        assert main(train_command("parts", *base, f"trainer.max_steps={max_steps}")) == 0
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    assert (tmp_path / "whole" / "samples" / "step-00000002.png").is_file()
    assert (tmp_path / "whole" / "checkpoints" / "step-00000002" / "ip_adapter.safetensors").is_file()

    capfd.readouterr()
    assert main(train_command("other", *base, "base.vae_path=null", "trainer.max_steps=1")) == 2
    assert "vae_sha256" in capfd.readouterr().err
