import csv

from ipa_train.training.csv_log import CSVLog


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_on_the_disk_at_once_and_exact(tmp_path):
    log = CSVLog(path=str(tmp_path / "run" / "metrics.csv"))
    log.log_metrics({"train/loss": 0.1 + 0.2}, step=1)
    assert float(rows(log.path)[0]["train/loss"]) == 0.1 + 0.2


def test_a_new_metric_adds_a_column(tmp_path):
    log = CSVLog(path=str(tmp_path / "metrics.csv"))
    log.log_metrics({"train/loss": 1.0}, step=1)
    log.log_metrics({"train/loss": 2.0, "val/gap": 3.0}, step=2)
    log.log_metrics({"val/gap": 4.0}, step=2)
    assert rows(log.path) == [
        {"step": "1", "train/loss": "1.0", "val/gap": ""},
        {"step": "2", "train/loss": "2.0", "val/gap": "3.0"},
        {"step": "2", "train/loss": "", "val/gap": "4.0"},
    ]


def test_a_resumed_run_appends_and_replaces_what_it_repeats(tmp_path):
    first = CSVLog(path=str(tmp_path / "metrics.csv"))
    for step in (10, 20, 30):
        first.log_metrics({"train/loss": float(step)}, step=step)
    with first.path.open("a") as file:
        file.write("40,0.")  # killed within a row

    second = CSVLog(path=str(tmp_path / "metrics.csv"))
    second.resume(20)
    second.log_metrics({"train/lr": 1e-4, "train/loss": -30.0}, step=30)
    assert [(r["step"], r["train/loss"], r["train/lr"]) for r in rows(second.path)] == [
        ("10", "10.0", ""),
        ("20", "20.0", ""),
        ("30", "-30.0", "0.0001"),
    ]


def test_a_torn_row_is_dropped_even_if_nothing_else_is(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n1,0.5\n2,0.")
    log = CSVLog(path=str(path))
    log.resume(5)
    log.log_metrics({"train/loss": 0.25}, step=6)
    assert [r["step"] for r in rows(path)] == ["1", "6"]
