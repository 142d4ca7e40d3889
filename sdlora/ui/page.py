"""Puts the page together and listens for a browser.

Nothing leaves the machine: no analytics, no fonts from elsewhere, and only this computer may connect unless a password is set. The
folder of pictures may be read from the page; the folder of LoRA files may not.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from sdlora.errors import UserError
from sdlora.jobs import Jobs, keep_going
from sdlora.ui import compare_page, generate_page, library_page, train_page, words
from sdlora.ui import studio as studios
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio
from sdlora.ui.words import label

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
LARGEST_UPLOAD = "4gb"  # a LoRA of everything in SDXL has 3; each page has a limit of its own
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OWN = """
.gradio-container { max-width: 1360px !important; width: 100% !important; margin: 0 auto !important; }
#title h1 { font-size: 1.9rem; font-weight: 700; margin: 0; letter-spacing: -0.02em; }
#title p { color: var(--body-text-color-subdued); margin: 0.1rem 0 0; }
#examples { gap: 6px; margin-top: -8px; }
#examples button { font-weight: 400; white-space: normal; line-height: 1.25; }
#examples button, .flat { background: var(--block-background-fill); color: var(--body-text-color); }
#examples button, .flat { border: 1px solid var(--border-color-primary); }
.flat { font-weight: 400; border-width: 1px 0 0; border-radius: 0; box-shadow: none; }
#examples button:hover, .flat:hover { color: var(--primary-600); border-color: var(--primary-300); }
#stop:disabled { background: var(--border-color-primary); color: var(--body-text-color-subdued); opacity: 1; }
.message { border-radius: 6px; padding: 12px 16px; min-height: 58px; background: var(--block-background-fill); overflow-wrap: anywhere; }
.message { border: 1px solid var(--border-color-primary); box-shadow: inset 4px 0 0 var(--border-color-primary); }
.message.busy { box-shadow: inset 4px 0 0 var(--primary-500); }
.message.good { box-shadow: inset 4px 0 0 #16a34a; }
.message.bad { box-shadow: inset 4px 0 0 #dc2626; border-color: #dc2626; }
#title, #status, #welcome, :is(#title, #status, #welcome) > * { padding: 0 !important; }
.message { display: flex; flex-direction: column; justify-content: center; }
.bar { height: 6px; border-radius: 3px; margin-top: 8px; background: var(--border-color-primary); overflow: hidden; }
.bar div { height: 100%; background: var(--primary-500); transition: width 0.15s linear; }
.welcome { padding: 36px 32px; border: 2px dashed var(--border-color-primary); border-radius: 12px; color: var(--body-text-color-subdued); }
.welcome h2 { font-size: 1.2rem; margin: 0 0 12px; color: var(--body-text-color); }
.welcome ol { padding-left: 1.3em; line-height: 2; list-style: decimal; }
.pictures label.float { position: static; border: none; background: none; box-shadow: none; padding: 10px 12px 2px; font-weight: 600; }
.pictures label.float span:first-child { display: none; }
.pictures .grid-wrap { max-height: none; height: auto; min-height: 0; overflow: visible; }
.pictures .grid-container { padding-top: 4px; }
.pictures .caption-label { font-size: 0.75rem; padding: 1px 7px; opacity: 0.85; }
.pictures img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.pictures.small img { image-rendering: pixelated; }
.findings { list-style: none; padding: 0; margin: 8px 0 0; }
.finding { padding: 8px 12px; margin: 0 0 6px; border-radius: 6px; overflow-wrap: anywhere; background: var(--block-background-fill); }
.finding { border: 1px solid var(--border-color-primary); box-shadow: inset 4px 0 0 var(--border-color-primary); }
.finding.bad { box-shadow: inset 4px 0 0 #dc2626; }
.finding.busy { box-shadow: inset 4px 0 0 #d97706; }
.finding.calm { box-shadow: inset 4px 0 0 #3b6fb5; }
@media (max-width: 640px) { #tabs .tab-container button { padding: 8px 7px; font-size: 0.9rem; } }
"""
CSS = _OWN + train_page.CSS + generate_page.CSS + compare_page.CSS + library_page.CSS


def build(roots: Roots, studio: Studio | None = None) -> gr.Blocks:
    """The page, not yet listening.

    Args:
        studio: where it draws; one of its own if not given.

    Raises:
        UserError: if LoRA files or runs lie inside the folder of pictures.
    """
    for inside in (roots.runs, roots.loras, roots.bases, roots.trash):
        if inside.resolve().is_relative_to(roots.outputs.resolve()):
            raise UserError(f"Folder {roots.outputs} holds {inside}, and all that it holds can be read from the page; choose another.")
    studio, jobs = studio or Studio(roots), Jobs(roots.runs)
    demo: gr.Blocks

    def on_load(request: gr.Request) -> str:
        return _title(words.language_of(request.headers))

    with gr.Blocks(title="sdlora", analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)) as demo:
        title = gr.HTML(_title("en"), elem_id="title", padding=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(label("page.train"), id="train", elem_id="tab-train"):
                training = train_page.layout(roots, jobs, base=roots.first)
            with gr.Tab(label("page.generate"), id="generate", elem_id="tab-generate"):
                drawing = generate_page.layout(roots, studio, base=roots.first)
            with gr.Tab(label("page.compare"), id="compare", elem_id="tab-compare") as compare_tab:
                comparing = compare_page.layout(roots, studio, base=roots.first)
            with gr.Tab(label("page.library"), id="library", elem_id="tab-library") as library_tab:
                shelf = library_page.layout(roots, studio, base=roots.first)
        demo.load(on_load, outputs=title, **QUIET)
        generate_page.wire(roots, studio, drawing, demo)
        for tab, name in ((compare_tab, "compare"), (library_tab, "library")):  # what was trained meanwhile is in the lists
            tab.select(None, js=f"() => {{ document.querySelector('#{name}-refresh').click(); }}", api_visibility="private")
        for used, setting in (
            (train_page.wire(roots, jobs, training, demo, partial(studios.is_free, studio)), training.watch.setting),
            (compare_page.wire(roots, studio, comparing, demo), comparing.setting),
            (library_page.wire(roots, studio, shelf, demo), shelf.setting),
        ):
            generate_page.receive(studio, drawing, used, setting)
            used.then(lambda told: gr.Tabs(selected="generate") if told else gr.Tabs(), setting, tabs, **QUIET)
    return demo


def launch(
    roots: Roots, *, host: str = "127.0.0.1", port: int = 7860, password: str | None = None,
    open_browser: bool = False, wait: bool = True,
) -> gr.Blocks:  # fmt: skip
    """Serves the page; returns when it is interrupted, or at once if `wait` is false.

    Args:
        password: asked for in the browser (the user name is free); needed for any host but this computer.
        open_browser: opens the page in the default browser.

    Raises:
        UserError: if the host needs a password, or the port is taken.
    """
    if host not in LOOPBACK and not password:
        raise UserError(f"Host {host} lets other computers in; give a password too, or listen on 127.0.0.1.")
    studio = Studio(roots)
    demo = build(roots, studio)
    try:
        demo.launch(
            server_name=host, server_port=port, auth=_guard(password), inbrowser=open_browser, prevent_thread_lock=True, quiet=True,
            share=False, ssr_mode=False, footer_links=["api"], allowed_paths=[str(roots.outputs.resolve())], theme=_theme(), css=CSS,
            i18n=words.i18n(), max_file_size=LARGEST_UPLOAD,
        )  # fmt: skip
    except OSError as problem:
        raise UserError(f"Port {port} on {host} cannot be used, most likely because it is taken; choose another with --port.") from problem
    keep_going(Jobs(roots.runs), ready=partial(studios.make_room, studio))
    print(f"The page is at {demo.local_url} (Ctrl+C ends it)", flush=True)
    if wait:
        demo.block_thread()
    return demo


def _title(language: str) -> str:
    return f"<h1>{words.say('page.title', language)}</h1><p>{words.say('page.subtitle', language)}</p>"


def _theme() -> gr.themes.Base:
    """gradio's plain look in violet, with fonts that every system has, so that nothing is fetched."""
    fonts, mono = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")
    plain = gr.themes.Default(primary_hue="violet", neutral_hue="slate", radius_size="lg", font=fonts, font_mono=mono)
    return plain.set(
        body_background_fill="*neutral_50", block_title_text_weight="600", block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200", block_label_text_color="*neutral_800",
        block_label_text_color_dark="*neutral_100", button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700", button_primary_text_color="white",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400", block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400", input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        checkbox_border_color_dark="*neutral_400", checkbox_border_color="*neutral_500",
    )  # fmt: skip


def _guard(password: str | None) -> Callable[[str, str], bool] | None:
    """Whether a login is right; compared in constant time."""
    if not password:
        return None
    return lambda user, given: hmac.compare_digest(given.encode(), password.encode())
