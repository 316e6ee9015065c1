"""Every shipped config binds, and every typo gets one line that names it."""

import importlib.util
import shutil

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from ipa_train.adapter import MLPProjector, Resampler
from ipa_train.cli.binding import check_targets, instantiate
from ipa_train.cli.config import config_folder, load_config
from ipa_train.errors import ConfigError

REQUIRED = ["run.name=x", "data.shards=y"]
CHOICES = sorted(
    f"{path.parent.name}={path.stem}" for path in config_folder().glob("*/*.yaml") if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_group_choice_binds(choice):
    if choice == "optimizer=adamw8bit":
        pytest.importorskip("bitsandbytes", reason="an optional extra: pip install -e '.[low-bit]'")
    load_config([choice, *REQUIRED])


def test_a_missing_extra_is_named():
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ConfigError, match=r"needs the package 'bitsandbytes': pip install 'ipa-train\[low-bit\]'"):
        load_config(["optimizer=adamw8bit", *REQUIRED])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_binds_and_says_how_to_run_it(experiment):
    load_config([f"experiment={experiment}", *REQUIRED])
    note = (config_folder() / "experiment" / f"{experiment}.yaml").read_text()
    for part in ("Command:", "Trains:", "Hardware:", f"experiment={experiment}"):
        assert part in note


def test_the_paper_is_the_default():
    config = load_config(["experiment=sd15_linear", *REQUIRED])
    assert OmegaConf.to_container(config.dropout) == {
        "_target_": "ipa_train.conditioning.ConditionDropout",
        "text_rate": 0.05,
        "image_rate": 0.05,
        "both_rate": 0.05,
    }
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-4, 0.01)
    assert (config.data.global_batch_size, config.data.resolution) == (64, 512)
    assert config.run.path == "outputs/x"


def test_experiments_choose_the_official_shapes():
    plus = instantiate(load_config(["experiment=sd15_plus", *REQUIRED]).adapter.projector)
    projector = plus(feature_dim=1280, context_dim=768)
    assert isinstance(projector, Resampler)
    assert projector.latents.shape == (1, 16, 768)
    assert projector.layers[0].heads == 12
    full = instantiate(load_config(["experiment=sd15_full", *REQUIRED]).adapter.projector)
    assert full.func is MLPProjector


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.resolutoin=512"], r"no option 'data\.resolutoin'\. Did you mean 'data\.resolution'"),
        (["dta.resolution=512"], "no option 'dta"),
        (["experiment=sd15_lineer"], r"experiment=sd15_lineer: there is no .*Did you mean 'sd15_linear'"),
        (["base=sd155"], r"base=sd155: there is no base/sd155\.yaml\. Did you mean 'sd15'"),
        (["optimizer.lrr=1"], r"Did you mean 'optimizer\.lr'"),
        (["sed=1"], "Did you mean 'seed'"),
        (["experiment"], "'experiment' is no override: write key=value"),
        (["+optimizer.momentum=0.9"], r"optimizer\.momentum: torch\.optim\.AdamW has no such option"),
        (["~data.global_batch_size"], r"data\.global_batch_size: .* needs it"),
        (["base._target_=ipa_train.bases.StableDifusion"], "no 'StableDifusion' there. Did you mean 'StableDiffusion'"),
        (["data.shards=[a"], "cannot read the overrides"),
        (["zzz=1"], "there is no option 'zzz'. Allowed: acceleration, adapter, base,"),
        (["logger=wandb", "logger.wandb.oflne=true"], r"Did you mean 'logger\.wandb\.offline'"),
        (["lr_schedule="], r"there is no lr_schedule/\.yaml\. Allowed: constant, cosine, linear"),
        (["+experiment=sd15_plus"], "experiment may be chosen once"),
        (["data.num_workers=two"], r"data\.num_workers=two does not fit: give int"),
        (["data.shards=5"], r"data\.shards=5 does not fit"),
        (["acceleration.float8=yess"], "does not fit: give bool"),
        (["optimizer.lr=fast"], r"optimizer\.lr=fast does not fit: give float"),
        (["optimizer.betas=[0.9]"], r"optimizer\.betas=\[0\.9\] does not fit"),
        (["trainer.max_steps=1e6"], r"trainer\.max_steps=1000000\.0 does not fit: give int"),
        (["trainer.precision=bf17"], r"trainer\.precision=bf17 does not fit: give .*bf16-true"),
        (["logger.csv.path=null"], r"logger\.csv\.path=null does not fit: give str"),
        (["seed=abc"], "seed=abc does not fit: give a whole number"),
        (["seed=-1"], "seed=-1 does not fit"),
        (["run.name=''"], r"run\.name is empty"),
    ],
)
def test_mistakes_get_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config([*REQUIRED, *overrides])
    assert "\n" not in str(error.value)


def test_what_must_be_set_is_named():
    with pytest.raises(ConfigError, match=r"data\.shards is not set: add data\.shards="):
        load_config(["run.name=x"])
    with pytest.raises(ConfigError, match=r"^run\.name is not set: add run\.name="):
        load_config(["data.shards=y"])


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("/data/{00000..41000}.tar", "/data/{00000..41000}.tar"),
        ("'/data/{00000..41000}.tar'", "/data/{00000..41000}.tar"),
        ("/my data/{0..9}/{00..99}.tar", "/my data/{0..9}/{00..99}.tar"),
        ("[/a/{0..1}.tar,/b/*.tar]", ["/a/{0..1}.tar", "/b/*.tar"]),
        ("[/a/{0..1}.tar, /b/*.tar]", ["/a/{0..1}.tar", "/b/*.tar"]),
        (
            "{a: /x/{0..1}.tar, b: [/y, s3://z/{00..99}.tar]}",
            {"a": "/x/{0..1}.tar", "b": ["/y", "s3://z/{00..99}.tar"]},
        ),
        ("https://host:8080/{0..9}.tar", "https://host:8080/{0..9}.tar"),
    ],
)
def test_ranges_of_shards_need_no_second_quotes(typed, value):
    assert load_config(["run.name=x", f"data.shards={typed}"]).data.shards == value


def test_a_number_is_a_name():
    config = load_config(["run.name=7", "data.shards=y", "logger=wandb"])
    assert (config.run.name, config.logger.wandb.name, config.run.path) == ("7", "7", "outputs/7")


def test_what_another_library_refuses_is_the_users_and_what_ours_trips_over_is_not():
    node = load_config(["trainer.strategy=dpp", *REQUIRED]).trainer
    with pytest.raises(ConfigError, match=r"lightning\.Trainer: .*strategy='dpp'"):
        instantiate(node)
    node = OmegaConf.create({"_target_": "ipa_train.training.ema.AdapterEMA", "decay": "high"})
    with pytest.raises(InstantiationException):
        instantiate(node)


def test_a_typo_inside_a_yaml_file_is_found(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\ndropout:\n  txt_rate: 0.1\n")
    with pytest.raises(ConfigError, match=r"txt_rate"):
        load_config(["experiment=own", *REQUIRED], config_dir=str(tmp_path))
    node = OmegaConf.create({"dropout": {"_target_": "ipa_train.conditioning.ConditionDropout", "txt_rate": 0.1}})
    with pytest.raises(ConfigError, match=r"dropout\.txt_rate: .* no such option\. Did you mean 'text_rate'"):
        check_targets(node)


def test_experiments_of_ones_own(tmp_path):
    (tmp_path / "experiment").mkdir()
    shutil.copy(config_folder() / "experiment" / "sd15_plus.yaml", tmp_path / "experiment" / "own.yaml")
    config = load_config(["experiment=own", *REQUIRED], config_dir=str(tmp_path))
    assert config.adapter.projector._target_ == "ipa_train.adapter.Resampler"
    with pytest.raises(ConfigError, match=r"--config-dir .*no such folder"):
        load_config(REQUIRED, config_dir=str(tmp_path / "nothing"))


def test_constructors_own_words_reach_the_user():
    node = load_config(["dropout.text_rate=0.9", "dropout.image_rate=0.9", *REQUIRED]).dropout
    with pytest.raises(ConfigError, match="the rates must add up to at most 1"):
        instantiate(node)
