"""Training from a web server: the same losses as from a disk, within the cap, and nothing is left running."""

import multiprocessing
import shutil
import subprocess
import sys

import pytest

from ipa_train.cli.main import main
from ipa_train.data.local_copies import GIB
from tests.data.http_server import http_server
from tests.end_to_end.conftest import loss_curve, write_shards


def test_training_from_a_server_is_training_from_a_disk(train_command, shards, tmp_path):
    assert main(train_command("local", "trainer.max_steps=4")) == 0
    cap = sum(path.stat().st_size for path in shards.glob("*.tar")) * 1.01 / GIB
    with http_server(shards) as server:
        remote = [
            f"data.shards={server.url}/{{00000..00002}}.tar",
            f"data.index_dir={tmp_path / 'index'}",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"data.cache_gib={cap}",
        ]
        for max_steps, workers in ((2, 0), (4, 2)):
            options = (f"trainer.max_steps={max_steps}", f"data.num_workers={workers}")
            assert main(train_command("remote", *options, *remote)) == 0
        assert server.count("GET") == 3, "a resumed run finds what the first has downloaded"
    assert loss_curve(tmp_path / "remote") == loss_curve(tmp_path / "local")
    assert not multiprocessing.active_children()


def test_two_ranks_share_a_cache_that_holds_only_a_part(train_command, tmp_path):
    folder = write_shards(tmp_path / "many", num_shards=12, per_shard=10)
    order = ["data.num_lanes=2", "data.window_size=10", "data.global_batch_size=8", "trainer.max_steps=12"]
    assert main(train_command("local", *order, f"data.shards={folder}")) == 0
    cap = 0.7 * sum(path.stat().st_size for path in folder.glob("*.tar"))
    with http_server(folder) as server:
        remote = [
            f"data.shards={server.url}/{{00000..00011}}.tar",
            f"data.index_dir={tmp_path / 'index'}",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"data.cache_gib={cap / GIB}",
            "data.num_workers=1",
            "trainer.devices=2",
            "trainer.strategy=ddp",
        ]
        command = train_command("remote", *order, *remote)
        subprocess.run([sys.executable, "-m", "ipa_train.cli.main", *command], check=True, timeout=300)
        assert server.count("GET") <= 12 + 20, "once to index, once to train, and few of them again"
    local, two = loss_curve(tmp_path / "local"), loss_curve(tmp_path / "remote")
    assert {step: float(loss) for step, loss in two.items()} == pytest.approx(
        {step: float(loss) for step, loss in local.items()}, rel=1e-5
    )
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*")) <= cap


def test_a_run_that_fails_leaves_no_downloads_behind(train_command, shards, tmp_path, capfd):
    with http_server(write_shards(tmp_path / "shards")) as server:
        remote = [
            f"data.shards={server.url}/{{00000..00002}}.tar",
            f"data.index_dir={tmp_path / 'index'}",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.patience_seconds=0.1",
        ]
        assert main(train_command("gone", "trainer.max_steps=2", *remote)) == 0
        shutil.rmtree(tmp_path / "cache")
        for path in server.folder.glob("*.tar"):
            server.faults[path.name] = [("status", 500)] * 1000
        assert main(train_command("gone", "trainer.max_steps=6", *remote)) == 2
    assert "8 samples in a row are bad, the shards are damaged" in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_the_fallback_trains_and_goes_on(train_command, shards, tmp_path, capfd):
    source = [f"data.shards='pipe:cat {shards}/{{00000..00002}}.tar'", "data=webdataset", "data.allow_shell=true"]
    command = train_command("streamed", *source)
    assert main(["check", *command[1:]]) == 0
    assert "3 sources, streamed without an index" in capfd.readouterr().out
    for max_steps, workers in ((2, 0), (4, 2)):
        assert main([*command, f"trainer.max_steps={max_steps}", f"data.num_workers={workers}"]) == 0
        assert capfd.readouterr().err.count("order, resume and every sample once per epoch do not hold") == 1
    assert sorted(loss_curve(tmp_path / "streamed")) == [1, 2, 3, 4]
