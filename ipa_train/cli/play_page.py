"""The page of `ipa play`, in Gradio."""

import html
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ipa_train.cli.image_prompts import read_embeddings, read_picture
from ipa_train.errors import ConfigError, UserError
from ipa_train.eval.layers import Layers, layer_choices
from ipa_train.eval.playground import Playground, Settings, is_out_of_memory

_MAX_HISTORY = 60
_SECONDS_TO_READ = 30
_DAY = 24 * 60 * 60
# Gradio's own fonts come from a server of their own.
_THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_STYLE = """
.drawn img { width: 100%; height: 100%; object-fit: contain; }
.facts { color: var(--body-text-color-subdued); }
#history .caption-label { font-size: var(--text-xs); max-width: calc(100% - 12px); padding: 1px 6px; }
"""


class Page:
    """The controls, and what they do."""

    def __init__(self, playground: Playground, *, title: str, bases: Sequence[str]) -> None:
        """Load the first of ``bases``.

        Raises:
            ConfigError, ExportError: it cannot be loaded, or the adapter does not fit it.
        """
        self._playground, self._title, self._bases = playground, title, list(dict.fromkeys(bases))
        self._loaded = playground.pipeline(self._bases[0])

    def blocks(self) -> gr.Blocks:
        """Lay the page out."""
        encoder, several = self._loaded.image_encoder, len(self._bases) > 1
        layers = layer_choices(self._loaded.base)
        with gr.Blocks(title=f"ipa play: {self._title}", delete_cache=(_DAY, _DAY)) as blocks:
            gr.Markdown(f"## {_plain(self._title)}")
            gr.Markdown(_plain(self._facts()), elem_classes="facts")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    pictures = gr.Gallery(
                        label="Image prompts",
                        type="filepath",
                        file_types=["image"],
                        columns=3,
                        fit_columns=False,
                        object_fit="contain",
                        height=220,
                        interactive=True,
                        visible=encoder.image_size is not None,
                        elem_id="image-prompts",
                    )
                    embeddings = gr.File(
                        label="Embeddings of the image prompts (.npy)",
                        file_count="multiple",
                        visible=encoder.embedding_shape is not None,
                        elem_id="embeddings",
                    )
                    prompt = gr.Textbox(label="Text", placeholder="none: the image prompts alone", elem_id="prompt")
                    scale = gr.Slider(
                        0, 2, self._usual_scale(), step=0.05, label="Scale of the image prompts", elem_id="scale"
                    )
                    preset = gr.Radio(
                        [(name.capitalize(), name) for name in layers],
                        value="all",
                        label="What follows the image prompts",
                        visible=len(layers) > 1,
                        elem_id="layers",
                    )
                    with gr.Row():
                        seed = _number("Seed", 0, precision=0, minimum=0, maximum=2**32 - 1)
                        steps = _number("Steps", 30, precision=0)
                        guidance = _number("Guidance", self._loaded.own_guidance_scale)
                        size = _number("Size", self._loaded.own_size, precision=0)
                    base = gr.Dropdown(self._bases, value=self._bases[0], label="Base", visible=several, elem_id="base")
                    button = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Column(scale=3, min_width=480):
                    with gr.Row():
                        drawn = _picture("With the image prompts", "drawn")
                        reference = _picture("Same seed at scale 0", "reference")
                    history = gr.Gallery(
                        label="Drawn so far",
                        type="filepath",
                        format="png",
                        columns=5,
                        fit_columns=False,
                        object_fit="contain",
                        height=300,
                        interactive=False,
                        elem_id="history",
                    )
            gr.on(
                [button.click, prompt.submit],
                self._draw,
                [pictures, embeddings, base, prompt, scale, preset, seed, steps, guidance, size, history],
                [drawn, reference, history],
                show_progress_on=[drawn],
            )
        return blocks

    def _draw(
        self,
        pictures: list[tuple[str, str | None]] | None,
        embeddings: list[str] | None,
        base: str,
        prompt: str,
        scale: float,
        layers: Layers,
        seed: int | None,
        steps: int | None,
        guidance: float | None,
        size: int | None,
        history: list[tuple[str, str | None]] | None,
        progress: Any = gr.Progress(),  # noqa: B008 - Gradio looks for it among the defaults
    ) -> tuple[Image.Image, Image.Image, list[tuple[Any, str | None]]]:
        """Answer the button: the picture, the same seed at scale 0, and the history with the picture before it."""
        with _complaints_in_the_page():
            if seed is None or steps is None or guidance is None or size is None:
                raise ConfigError("seed, steps, guidance and size must be numbers.")
            settings = Settings(
                base=base,
                prompt=prompt,
                scale=scale,
                layers=layers,
                seed=seed,
                num_inference_steps=steps,
                guidance_scale=guidance,
                size=size,
            )
            drawn, reference = self._playground.draw(
                settings,
                [read_picture(Path(path), Path(path).name) for path, _ in pictures or []],
                read_embeddings([(Path(path).name, Path(path)) for path in embeddings or []]),
                lambda done, steps: progress((done, steps), unit="steps"),
            )
        # Older entries are files already; only the new picture has to be written.
        shown: list[tuple[Any, str | None]] = [(drawn, _caption(settings)), *(history or [])]
        return drawn, reference, shown[:_MAX_HISTORY]

    def _usual_scale(self) -> float:
        return 0.5 if self._loaded.adapter.family == "sd3" else 1.0

    def _facts(self) -> str:
        adapter, encoder = self._loaded.adapter, self._loaded.image_encoder.identity()["name"]
        tokens = "" if adapter.num_tokens is None else f", {adapter.num_tokens} image tokens"
        size = f"{adapter.num_parameters / 1e6:,.1f}M parameters"
        return f"{adapter.variant}{tokens}, {size} · base {self._bases[0]} · image encoder {encoder}"


def serve(page: Page, *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C: to no one but who reaches the address, with nothing of it from elsewhere."""
    blocks = page.blocks()
    blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=_THEME,
        css=_STYLE,
        app_kwargs={"middleware": [Middleware(_OwnContentAlone)]},
    )
    sys.stdout.write(f"{blocks.local_url}\n")
    sys.stdout.flush()
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


class _OwnContentAlone:
    """Forbid the browser to fetch anything from another server, whatever the page asks for."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY)]
            await send(message)

        await self._app(scope, receive, send_with_policy)


@contextmanager
def _complaints_in_the_page() -> Iterator[None]:
    """Show what a user can mend as one line in the page, where options are controls."""
    try:
        yield
    except UserError as error:
        message = re.sub(r"(?<![\w-])--(?=[a-z])", "", " ".join(str(error).split()))
        raise gr.Error(html.escape(message), duration=_SECONDS_TO_READ, print_exception=False) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise gr.Error(
            "out of memory: choose a smaller size.", duration=_SECONDS_TO_READ, print_exception=False
        ) from error


def _picture(label: str, name: str) -> gr.Image:
    """One of the two results, to the bit: Gradio's usual format loses some."""
    return gr.Image(
        label=label,
        format="png",
        height=360,
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_id=name,
        elem_classes="drawn",
    )


def _number(label: str, value: float, **options: Any) -> gr.Number:
    return gr.Number(value, label=label, min_width=80, elem_id=label.lower(), **options)


def _caption(settings: Settings) -> str:
    layers = "" if settings.layers == "all" else f", {settings.layers}"
    text = f", {settings.prompt}" if settings.prompt else ""
    return f"scale {settings.scale:g}{layers}, seed {settings.seed}{text}"


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to do."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$])", r"\\\1", text)
