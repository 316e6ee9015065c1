"""`ipa play` in a real browser, and what it says before there is a page."""

import io
import json
import re
import shutil
import socket
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases import load_base
from ipa_train.bases.tiny import randomise
from ipa_train.cli.main import main
from ipa_train.export import write_export
from tests.serving import free_port, serving


@pytest.fixture(scope="module")
def adapter(tiny_sdxl, tmp_path_factory):
    """A random adapter of the tiny SDXL."""
    base = load_base(str(tiny_sdxl[0]), dtype="float32")
    sites = base.attention_sites()
    torch.manual_seed(0)
    projector = LinearProjector(feature_dim=24, context_dim=base.context_dim)
    adapter = randomise(IPAdapter(projector=projector, sites=sites), seed=5)
    return write_export(tmp_path_factory.mktemp("adapter"), adapter, sites, metadata={})[0]


@pytest.fixture(scope="module")
def address(adapter, tiny_sdxl, tiny_models):
    """Of the page of that adapter, with a second base that it does not fit."""
    pytest.importorskip("gradio")
    words = ["play", adapter, "--base", tiny_sdxl[0], "--image-encoder", tiny_sdxl[1], "--other-bases", tiny_models[0]]
    with serving(words) as (address, _):
        yield address


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium that notes what it fetches."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as started:
        yield started


@pytest.fixture
def page(chromium, address):
    """The page as it opens, with two steps to draw in."""
    page = OpenPage(chromium, address)
    page.set("steps", 2)
    return page


class OpenPage:
    """What a user does with the page."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.find("#draw"))

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, found, seconds=120):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if result := found():
                return result
            time.sleep(0.1)
        pytest.fail(
            f"nothing came in {seconds} s; the page says: {self.driver.find_element('css selector', 'body').text}"
        )

    def add(self, *paths):
        count = len(self.find("#image-prompts img"))
        self.find("#image-prompts input[type=file]")[0].send_keys("\n".join(map(str, paths)))
        self.wait(lambda: len(self.find("#image-prompts img")) > count)

    def set(self, name, value):
        from selenium.webdriver.common.keys import Keys

        (field,) = self.find(f"#{name} input[type=number], #{name} textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def choose(self, name, label):
        self.driver.find_element("xpath", f"//*[@id='{name}']//label[contains(., '{label}')]").click()

    def draw(self):
        """Press the button; the pictures with and without the image prompts."""
        count = len(self.find("#history img"))
        self.find("#draw")[0].click()
        self.wait(lambda: len(self.find("#history img")) > count)
        return [self._picture(name) for name in ("drawn", "reference")]

    def complaint(self):
        """Press the button; what the page says instead of drawing."""
        self.find("#draw")[0].click()
        (text,) = self.wait(lambda: self.find(".toast-message-text"))
        said = text.get_attribute("textContent").strip()  # it may still be on its way into view
        self.driver.execute_script("arguments[0].click()", *self.find(".toast-close"))
        self.wait(lambda: not self.find(".toast-message-text"))
        return said

    def fetched(self):
        """The addresses of all that the browser asked for."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        }

    def _picture(self, name):
        (image,) = self.find(f"#{name} img")
        with urllib.request.urlopen(image.get_attribute("src")) as answer:
            return np.array(Image.open(io.BytesIO(answer.read())))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    (folder / "damaged.png").write_bytes((folder / "red.png").read_bytes()[:60])
    return folder


def test_pictures_follow_the_scale_and_at_scale_0_none_of_the_image_prompt_is_left(page, pictures, address):
    page.add(pictures / "red.png")
    page.set("prompt", "a cat")
    strong, reference = page.draw()
    assert strong.shape == reference.shape == (64, 64, 3)
    assert (strong != reference).any()
    page.set("scale", 0.5)
    weak, same = page.draw()
    assert (weak != strong).any()
    assert (same == reference).all()
    page.set("scale", 0)
    off, same = page.draw()
    assert (off == same).all()
    assert (same == reference).all()
    page.set("scale", 1)
    again, _ = page.draw()
    assert (again == strong).all(), "the same settings draw the same picture"
    assert len(page.find("#history img")) == 4
    elsewhere = {url for url in page.fetched() if not url.startswith((address, "data:", "blob:"))}
    assert not elsewhere


def test_settings_and_image_prompts_all_count(page, pictures):
    page.add(pictures / "red.png")
    red, reference = page.draw()
    page.choose("layers", "Style")
    style, same = page.draw()
    page.choose("layers", "Layout")
    layout, _ = page.draw()
    assert (same == reference).all()
    assert (style != red).any()
    assert (style != layout).any()
    assert (style != reference).any()
    page.choose("layers", "All")
    page.add(pictures / "blue.png")
    both, _ = page.draw()
    assert (both != red).any()
    for name, value in (("seed", 1), ("guidance", 2), ("prompt", "a dog"), ("steps", 3), ("size", 32)):
        page.set(name, value)
        _, other = page.draw()
        assert other.shape != reference.shape or (other != reference).any(), name
        reference = other


def test_mistakes_are_shown_in_the_page_which_goes_on(page, pictures):
    assert page.complaint() == "there is no image prompt: add a picture."
    page.add(pictures / "red.png")
    page.set("size", 33)
    assert page.complaint() == "size 33 must be a multiple of 8."
    page.set("size", 80_000_000)
    assert page.complaint() == "out of memory: choose a smaller size."
    page.set("size", 32)
    page.set("steps", 5000)
    assert "steps 5000 must be from 1 to 1000" in page.complaint()
    page.set("steps", 1)
    page.add(pictures / "damaged.png")
    assert "damaged.png: no picture that can be read" in page.complaint()


def test_a_base_that_the_adapter_does_not_fit_is_told_in_the_page(page, pictures, tiny_sdxl, tiny_models):
    page.add(pictures / "red.png")
    first, _ = page.draw()
    for base in (tiny_models[0], tiny_sdxl[0]):
        page.find("#base input")[0].click()
        page.driver.find_element("xpath", f"//*[@role='option' and @aria-label='{base}']").click()
        if base == tiny_models[0]:
            assert "made for a base whose image tokens have width 80" in page.complaint()
    again, _ = page.draw()
    assert (again == first).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.safetensors"], "neither a checkpoint nor a run with checkpoints"),
        (["ADAPTER", "--port", "0"], "--port must be from 1 to 65535, got 0"),
        (["ADAPTER", "--port", "TAKEN"], "--port .* cannot listen there"),
        (["ADAPTER", "--host", "no such host"], "--host no such host .* cannot listen there"),
    ],
)
def test_mistakes_at_the_start_are_one_line(words, said, adapter, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"ADAPTER": str(adapter), "TAKEN": str(taken.getsockname()[1])}
        assert main(["play", *(places.get(word, word) for word in words)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(said, line)


def test_other_hosts_than_this_machine_are_warned_of(tmp_path, capfd):
    for host, warned in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        assert main(["play", str(tmp_path), "--host", host, "--port", str(free_port())]) == 2
        assert ("whoever reaches this address can draw here" in capfd.readouterr().err) == warned


def test_an_adapter_of_another_base_is_refused_before_there_is_a_page(adapter, tiny_models, capfd):
    pytest.importorskip("gradio")
    words = [adapter, "--base", tiny_models[0], "--image-encoder", tiny_models[1], "--port", free_port()]
    assert main(["play", *map(str, words)]) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert "made for a base whose image tokens have width 80" in line


def test_without_gradio_the_page_says_what_to_install(adapter, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # Python's own way to have no such module
    monkeypatch.delitem(sys.modules, "ipa_train.cli.play_page", raising=False)
    assert main(["play", str(adapter), "--port", str(free_port())]) == 2
    assert "the page needs gradio, which is not installed: pip install 'ipa-train[play]'" in capfd.readouterr().err
