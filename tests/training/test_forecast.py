"""What is forecast of a run is what it takes, and the module does not notice."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks import memory, sizes
from ipa_train.acceleration import Acceleration
from ipa_train.adapter import LinearProjector, TimeResampler
from ipa_train.bases import StableDiffusion3, StableDiffusionXL
from ipa_train.bases.tiny import tiny_pipeline
from ipa_train.cli.forecast import Device, Plan, describe_memory, forecast_memory
from ipa_train.errors import ConfigError
from ipa_train.training.callbacks.metric_logging import SETTLED_STEPS, MetricLogging
from ipa_train.training.csv_log import CSVLog
from ipa_train.training.ema import AdapterEMA
from ipa_train.training.forecast import RESERVE_GIB, forecast, largest_batch_size, rehearse
from ipa_train.training.forecast.flops import FlopCounter
from ipa_train.training.forecast.forecast import bytes_elsewhere
from ipa_train.training.forecast.memory import MemoryMeter
from ipa_train.training.throughput import Arithmetic
from tests.official import official_denoiser
from tests.training.conftest import make_batch
from tests.training.test_callbacks import rows
from tests.training.toy import make_trainer


@pytest.fixture(params=["sd15", "sdxl", "sd3", "flux"])
def any_base(request):
    """A tiny base of each family, in fp32."""
    if request.param == "sd15":
        return request.getfixturevalue("base")
    if request.param == "sdxl":
        return StableDiffusionXL.from_pretrained(str(request.getfixturevalue("tiny_sdxl")[0]), dtype="float32")
    if request.param == "sd3":
        folder = request.getfixturevalue("tmp_path")
        tiny_pipeline("sd35m").save_pretrained(folder)
        return StableDiffusion3.from_pretrained(str(folder), dtype="float32")
    return request.getfixturevalue("flux")


def test_the_step_without_data_takes_what_the_real_one_takes(make_module, any_base):
    projector = (
        partial(TimeResampler, num_tokens=4, dim=64, heads=1)
        if isinstance(any_base, StableDiffusion3)
        else LinearProjector
    )
    module = make_module(base=any_base, projector=partial(projector))
    batch = make_batch(range(3))
    rehearsed = rehearse(module, batch)
    module.training_step(batch, 0)  # tables that are made once are there from here on
    trained = [p for p in module.parameters() if p.requires_grad]
    flops, meter = FlopCounter(), MemoryMeter()
    with meter, flops:
        meter.hold((*module.parameters(), *module.buffers()))
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        loss = module.training_step(batch, 0)
        forward = flops.total
        module.zero_grad()
        loss.backward()
    assert rehearsed.encoder_flops + rehearsed.forward_flops == forward
    assert rehearsed.backward_flops == flops.total - forward
    assert rehearsed.recomputed_flops == 0
    assert rehearsed.peak_bytes == pytest.approx(meter.peak, rel=0.02)


def test_the_module_is_left_as_it_was(make_module):
    module, batch = make_module(), make_batch(range(2))
    loss = module.training_step(batch, 0)
    module.metrics.compute_and_reset(lambda sums: sums)
    weights = [*module.parameters(), *module.buffers()]
    rehearse(module, batch)
    assert all(a is b for a, b in zip(weights, [*module.parameters(), *module.buffers()], strict=True))
    assert module.metrics.compute_and_reset(lambda sums: sums) == {}
    assert torch.equal(module.training_step(batch, 0), loss)
    assert all(p.grad is None for p in module.parameters())


def test_flops_are_the_published_counts_of_sd15():
    """At 256 pixels: 272.7 GFLOP of the VAE and 13.3 of the text encoder; 180.3 forward, 181.2 backward.

    In these 181.2 are 2.95 of the text's keys and values, whose gradient nobody needs and nothing computes.
    """
    case = replace(memory.CASES["full"], online=True, batch_size=2)
    rehearsed = rehearse(memory.make_module(case, "meta"), memory.make_batch(case))
    assert rehearsed.encoder_flops / 2e9 == pytest.approx(272.7 + 13.3, rel=0.01)
    assert rehearsed.forward_flops / 2e9 == pytest.approx(180.3, rel=0.01)
    assert rehearsed.backward_flops / 2e9 == pytest.approx(181.2 - 2.95, rel=0.01)


def test_flops_are_the_published_counts_of_sdxl():
    """At 512 pixels 1591.9 GFLOP, of which 2.7 are the adapter's, which is not there."""
    with torch.device("meta"):
        unet = official_denoiser("sdxl")
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        with FlopCounter() as counter, torch.no_grad():
            unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 2048), added_cond_kwargs=added)
    assert counter.total / 1e9 == pytest.approx(1591.9 - 2.7, rel=0.01)


def test_memory_is_what_two_real_steps_take():
    """Measured as the kernel's high-water mark, in a process of its own; the forecast needs none of the weights."""
    found = memory.compare("small")
    assert found["forecast_over_measured"] == pytest.approx(1.0, abs=0.15)
    assert sum(found["parts_gib"].values()) == pytest.approx(found["forecast_gib"])
    assert found["parts_gib"]["activations"] > 0.25 * found["forecast_gib"], "too small to say anything of activations"


def test_recomputation_is_told_from_the_backward(make_module):
    plain = rehearse(make_module(), make_batch(range(2)))
    module = make_module()
    Acceleration(checkpointing="full").apply(module.base)
    recomputing = rehearse(module, make_batch(range(2)))
    assert recomputing.encoder_flops == plain.encoder_flops
    assert recomputing.forward_flops == plain.forward_flops
    # Forwards of autograd functions run without gradients, and so count as a part of the backward when run again.
    assert recomputing.model_flops == pytest.approx(plain.model_flops, rel=0.02)
    assert 0.2 * plain.forward_flops < recomputing.recomputed_flops <= plain.forward_flops
    assert recomputing.activation_bytes < 0.8 * plain.activation_bytes
    assert recomputing.peak_bytes < plain.peak_bytes


@pytest.mark.parametrize(("policy", "slower"), [("none", None), ("selective", "none"), ("full", "selective")])
def test_auto_computes_no_more_again_than_it_must(policy, slower, make_module):
    module, batch = make_module(), make_batch(range(8))

    def peak(checkpointing):
        Acceleration(checkpointing=checkpointing).apply(module.base)
        return forecast(module, batch).peak_gib

    room = peak(policy) if slower is None else (peak(policy) + peak(slower)) / 2
    chosen = Acceleration(checkpointing="auto").choose_checkpointing(
        module.base, lambda: forecast(module, batch).peak_gib <= room
    )
    assert chosen == policy
    assert forecast(module, batch).peak_gib <= room, "it is applied"


def test_a_policy_that_was_set_is_kept_though_it_does_not_fit(make_module):
    acceleration = Acceleration(checkpointing="selective")
    assert acceleration.choose_checkpointing(make_module().base, lambda: False) == "selective"


def test_state_is_that_of_the_optimizer_the_average_and_the_exchange(make_module):
    def state_bytes(world_size=1, **options):
        found = forecast(make_module(**options), make_batch(range(1)), world_size=world_size)
        return found.state_bytes / found.num_trained

    assert state_bytes() == pytest.approx(8.0, rel=1e-3), "two moments of AdamW"
    assert state_bytes(optimizer=partial(torch.optim.SGD, lr=1.0)) == 0.0
    assert state_bytes(ema=AdapterEMA()) == pytest.approx(12.0, rel=1e-3)
    assert state_bytes(ema=AdapterEMA(), world_size=2) == pytest.approx(16.0, rel=1e-3)


def test_the_largest_batch_fits_and_the_next_does_not(make_module):
    module, batch = make_module(), make_batch(range(1))
    needed = {size: forecast(module, batch.blank(size)).peak_gib for size in (1, 11, 12)}
    assert largest_batch_size(module, batch, (needed[11] + needed[12]) / 2) == 11
    assert largest_batch_size(module, batch, needed[1] * 0.99) == 0


def test_a_device_holds_its_part_of_a_shared_out_flux_and_two_blocks():
    with torch.device("meta"):
        base = sizes.SIZES["flux"].base().to(torch.bfloat16)
    gib = {shards: 11.9 * 2 / 1.024**3 - bytes_elsewhere(base, shards) / 2**30 for shards in (1, 2, 8)}
    assert gib[1] == pytest.approx(22.2, abs=0.1)
    # Its largest blocks have 340 million parameters.
    assert gib[2] == pytest.approx(22.2 / 2 + 2 * 0.63, abs=0.2)
    assert gib[8] == pytest.approx(22.2 / 8 + 2 * 0.63, abs=0.2)


def test_what_is_elsewhere_is_not_needed_here(make_module, flux):
    module, batch = make_module(base=flux), make_batch(range(1))
    whole, shared = (forecast(module, batch, base_shards=shards) for shards in (1, 64))
    saved = (whole.rehearsal.peak_bytes - shared.rehearsal.peak_bytes,) * 2
    assert saved == (bytes_elsewhere(flux, 64), whole.rehearsal.frozen_bytes - shared.rehearsal.frozen_bytes)
    assert saved[0] > 0


def test_the_log_says_how_much_arithmetic_is_done(make_module, tmp_path):
    """From images per second, once a start has settled."""
    module = make_module()
    per_image = rehearse(module, make_batch(range(1))).model_flops
    log = CSVLog(path=str(tmp_path / "metrics.csv"))
    batches = [make_batch(range(4)) for _ in range(SETTLED_STEPS + 4)]
    trainer = make_trainer(len(batches), [MetricLogging(progress=False)], logger=log, log_every_n_steps=2)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    *first, second_last, last = rows(log.path)
    assert all(not row["perf/tflops"] for row in first)
    for row in (second_last, last):
        assert float(row["perf/tflops"]) == pytest.approx(float(row["perf/images_per_second"]) * per_image / 1e12)
        assert "perf/mfu" not in row, "this CPU's peak is not known"


def test_other_buckets_are_counted_in_proportion_to_their_pixels():
    """Of SD 1.5's own sizes: at three quarters of the pixels the count is within 5 %, and buckets differ by less."""
    case = replace(memory.CASES["full"], resolution=512)
    module = memory.make_module(case, "meta")
    arithmetic = Arithmetic(module, memory.make_batch(case))
    smaller = rehearse(module, memory.make_batch(replace(case, batch_size=1, resolution=448))).model_flops
    assert arithmetic.metrics(56 * 56)["perf/tflops"] * 1e12 == pytest.approx(smaller, rel=0.05)


def test_a_run_that_does_not_fit_is_refused_with_what_would(make_module):
    module, batch = make_module(), make_batch(range(1))
    small = Device("Small", RESERVE_GIB + forecast(module, batch.blank(5)).peak_gib, None, is_here=False)
    plan = Plan(world_size=1, num_micro_batches=1, batch_size=8)
    found = forecast_memory(module, batch, plan)
    with pytest.raises(ConfigError, match=r"of 8 samples needs .* Small has room .*: set data.batch_size=4, or acc"):
        list(describe_memory(module, batch, plan, small, found))
    fitting = Plan(world_size=1, num_micro_batches=2, batch_size=4)
    lines = list(describe_memory(module, batch, fitting, small, forecast_memory(module, batch, fitting)))
    assert "up to 5 samples" in lines[-1] or "up to 4 samples" in lines[-1]
