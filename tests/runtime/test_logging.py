import logging
import warnings


def test_information_comes_from_rank_0_alone_and_trouble_from_all(console):
    lines = console(rank=0)
    logging.getLogger("ipa_train.x").info("hello")
    assert lines()[0].endswith("INFO    hello")
    lines = console(rank=3)
    logging.getLogger("ipa_train.x").info("hello")
    logging.getLogger("ipa_train.x").warning("trouble")
    (line,) = lines()
    assert line.endswith("WARNING rank 3 trouble")


def test_a_warning_is_one_line(console):
    lines = console()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("first\n  second", UserWarning, stacklevel=1)
    (line,) = lines()
    assert "UserWarning: first second" in line


def test_libraries_that_talk_much_are_heard_only_when_something_is_wrong(console):
    import lightning.pytorch  # noqa: F401 - gives its loggers handlers of their own

    lines = console()
    logging.getLogger("lightning.pytorch").info("GPU available: False")
    logging.getLogger("lightning.pytorch").warning("something is wrong")
    (line,) = lines()
    assert line.endswith("something is wrong")


def test_setting_up_twice_does_not_say_things_twice(console):
    console()
    lines = console(level="debug")
    logging.getLogger("ipa_train.x").debug("once")
    assert len(lines()) == 1
