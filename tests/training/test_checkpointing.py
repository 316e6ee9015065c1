import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from ipa_train.errors import CheckpointError, ConfigError
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.checkpoint import list_checkpoints, newest_valid, verify
from tests.training.toy import Images, Stream, ToyTraining, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")


def fit(max_steps, folder, *, start=0, resume=None, callbacks=(), **options):
    module = ToyTraining()
    trainer = make_trainer(max_steps, [*callbacks, Checkpointing(folder=str(folder), every_steps=2)], **options)
    trainer.fit(module, torch.utils.data.DataLoader(Stream(start), batch_size=None), ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_steps_and_two_resumed_are_four(tmp_path, accumulate):
    whole, whole_trainer = fit(4, tmp_path / "whole", accumulate_grad_batches=accumulate)
    first, _ = fit(2, tmp_path / "parts", accumulate_grad_batches=accumulate)
    resume = newest_valid(tmp_path / "parts")
    second, trainer = fit(
        4, tmp_path / "parts", start=2 * accumulate, resume=resume, accumulate_grad_batches=accumulate
    )

    assert first.losses + second.losses == whole.losses
    assert trainer.global_step == 4
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(second.ema.state_dict(), whole.ema.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        trainer.optimizers[0].state_dict(), whole_trainer.optimizers[0].state_dict(), rtol=0, atol=0
    )
    for name in ("adapter.safetensors", "ema.safetensors"):
        ours, theirs = (load_file(tmp_path / d / "step-00000004" / name) for d in ("parts", "whole"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(tmp_path):
    fit(2, tmp_path)
    assert {name.split(".")[0] for name in load_file(tmp_path / "step-00000002" / "adapter.safetensors")} == {"adapter"}
    state = torch.load(tmp_path / "step-00000002" / "state.pt", weights_only=True)
    assert "state_dict" not in state
    assert not any("base" in str(key) for key in state)


def test_a_run_that_ends_between_two_saves_is_saved_where_it_ended(tmp_path):
    fit(5, tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_run_whose_data_end_is_saved_and_goes_on(tmp_path):
    module = ToyTraining()
    trainer = make_trainer(100, [Checkpointing(folder=str(tmp_path), every_steps=50)], max_epochs=1)
    trainer.fit(module, Images(length=3).loader())
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000000", "step-00000003"]
    _, resumed = fit(5, tmp_path, resume=newest_valid(tmp_path))
    assert resumed.global_step == 5


def test_a_start_without_a_step_leaves_no_new_checkpoint(tmp_path):
    """Else a run that crashes in its first steps would look to a batch script as if it went on."""
    fit(1, tmp_path)
    first = tmp_path / "step-00000000"
    written = first.stat().st_mtime_ns
    fit(1, tmp_path, resume=first)
    assert first.stat().st_mtime_ns == written


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


def test_whoever_stops_the_trainer_gets_a_checkpoint_of_that_step(tmp_path):
    _, trainer = fit(100, tmp_path, callbacks=[StopAt(3)])
    assert trainer.global_step == 3
    whole, _ = fit(5, tmp_path / "whole")
    resumed, _ = fit(5, tmp_path, start=3, resume=newest_valid(tmp_path))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_keeps_the_last_and_the_milestones(tmp_path):
    trainer = make_trainer(9, [Checkpointing(folder=str(tmp_path), every_steps=1, keep_last=2, keep_every=4)])
    trainer.fit(ToyTraining(), Images().loader())
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{s:08d}" for s in (0, 4, 8, 9)]


class Exporting(ToyTraining):
    def write_exports(self, folder):
        (folder / "ip_adapter.bin").write_bytes(b"weights")


def test_the_export_is_part_of_the_checkpoint(tmp_path):
    trainer = make_trainer(1, [Checkpointing(folder=str(tmp_path))])
    trainer.fit(Exporting(), Images().loader())
    path = tmp_path / "step-00000001"
    assert "ip_adapter.bin" in json.loads((path / "manifest.json").read_text())["files"]
    (path / "ip_adapter.bin").write_bytes(b"weight5")
    with pytest.raises(CheckpointError, match=r"ip_adapter\.bin is not the file that was written"):
        verify(path)


class FailingExport(ToyTraining):
    def write_exports(self, folder):
        (folder / "half").write_bytes(b"half")
        if self.trainer.global_step == 3:
            raise CheckpointError("no export of this")


def test_a_failing_export_stops_the_run_and_leaves_the_earlier_checkpoints_alone(tmp_path):
    trainer = make_trainer(5, [Checkpointing(folder=str(tmp_path), every_steps=1)])
    with pytest.raises(CheckpointError, match="no export of this"):
        trainer.fit(FailingExport(), Images().loader())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (0, 1, 2)]
    assert newest_valid(tmp_path) == tmp_path / "step-00000002"


def test_an_interrupted_run_is_not_saved_in_the_middle_of_a_step(tmp_path):
    class Interrupt(Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(10, tmp_path, callbacks=[Interrupt()])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000000", "step-00000002"]


def test_lightnings_own_names_are_refused(tmp_path):
    """Lightning saves ``hpc_ckpt_1.ckpt`` from within its signal handler, in the middle of a step."""
    _, trainer = fit(1, tmp_path)
    with pytest.raises(CheckpointError, match="no name for a checkpoint"):
        trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps is 0"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"every_steps": 10, "keep_every": 0}, "1 or more, or null"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Checkpointing(folder="x", **options)
