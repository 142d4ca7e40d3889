"""What is kept: each thing that an entry depends on gives it another name, nothing else does, and damage is never believed."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdlora import base_files, base_model, buckets, cache, latents, text
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.views import View

WHITE = (255, 255, 255)


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)


def noisy(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def view_of(path: Path, bucket: tuple[int, int] = (32, 32), **changes: object) -> View:
    with Image.open(path) as picture:
        size = picture.size
    return replace(View(path, size, buckets.fit(size, bucket, step_px=4)), **changes)


def fill(base: Base, views: list[View], folder: Path | None) -> list[latents.Latents]:
    return list(cache.latents(base, views, folder=folder, background=WHITE))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.safetensors")}


def test_what_was_made_is_read_back_and_the_autoencoder_is_not_asked_again(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [view_of(noisy(tmp_path / f"{i}.png", i)) for i in range(7)]
    made = fill(base, views, tmp_path / "cache")
    monkeypatch.setattr(base_model, "encode", lambda *_: pytest.fail("encoded again"))
    again = fill(base, views, tmp_path / "cache")
    for one, other in zip(made, again, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.deviation, other.deviation)
    assert len(names(tmp_path / "cache")) == 7


def changed_picture(base: Base, view: View) -> View:
    noisy(view.picture, 99)
    return view


def with_mask(base: Base, view: View) -> View:
    path = view.picture.with_name("mask.png")
    Image.new("L", view.original_px, 128).save(path)
    return replace(view, mask=path)


def other_vae(base: Base, view: View) -> View:
    base.vae_hash = "another"
    return view


CHANGES: dict[str, Callable[[Base, View], View]] = {
    "the picture": changed_picture,
    "the size": lambda base, view: view_of(view.picture, (32, 24)),
    "the crop": lambda base, view: replace(view, fit=replace(view.fit, left=view.fit.left + 1)),
    "mirrored": lambda base, view: replace(view, flipped=True),
    "a mask": with_mask,
    "the alpha channel as mask": lambda base, view: replace(view, mask="alpha"),
    "the autoencoder": other_vae,
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_thing_that_matters_makes_another_entry(base: Base, tmp_path: Path, change: str) -> None:
    view = view_of(noisy(tmp_path / "a.png"))
    fill(base, [view], tmp_path / "cache")
    first = names(tmp_path / "cache")
    fill(base, [CHANGES[change](base, view)], tmp_path / "cache")
    assert len(names(tmp_path / "cache") - first) == 1


def test_our_version_and_the_background_matter_too(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(noisy(tmp_path / "a.png"))
    fill(base, [view], tmp_path / "cache")
    list(cache.latents(base, [view], folder=tmp_path / "cache", background=(0, 0, 0)))
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    fill(base, [view], tmp_path / "cache")
    assert len(names(tmp_path / "cache")) == 3


def test_name_folder_and_time_do_not_matter(base: Base, tmp_path: Path) -> None:
    view = view_of(noisy(tmp_path / "a.png"))
    fill(base, [view], tmp_path / "cache")
    elsewhere = tmp_path / "other" / "b.png"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(view.picture.read_bytes())
    os.utime(elsewhere, (1, 1))
    fill(base, [view_of(elsewhere)], tmp_path / "cache")
    base.name = "called otherwise"
    fill(base, [view], tmp_path / "cache")
    assert len(names(tmp_path / "cache")) == 1


def test_text_states_are_kept_by_tokens_encoder_and_layer(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, honest = tmp_path / "cache", text.encode
    asked = []
    monkeypatch.setattr(text, "encode", lambda base, tokens: asked.append(1) or honest(base, tokens))
    tokens = text.tokens(base, ["a red star", "a cup", "a red star"])
    first = cache.text_states(base, tokens, folder=folder)
    assert len(asked) == 2, "equal texts are encoded once"
    assert torch.equal(cache.text_states(base, tokens, folder=folder).context, first.context)
    assert torch.equal(first.context, honest(base, tokens).context)
    assert len(asked) == 2
    base.clip_skip = 2
    cache.text_states(base, tokens, folder=folder)
    base.text_hash = "another"
    cache.text_states(base, tokens, folder=folder)
    assert len(asked) == 6


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_entry_is_found_out_and_made_anew(base: Base, tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "cache"
    view = view_of(noisy(tmp_path / "a.png"))
    (made,) = fill(base, [view], folder)
    (path,) = folder.rglob("*.safetensors")
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(125):
        place = int(torch.randint(len(whole), (1,), generator=generator))
        bit = 1 << int(torch.randint(8, (1,), generator=generator))
        cut = int(torch.randint(3, (1,), generator=generator)) == 0
        path.write_bytes(whole[:place] if cut else whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        kept = cache.get(folder, path.stem)
        assert kept is None or torch.equal(kept["mean"], made.mean), f"believed at byte {place}"
    path.write_bytes(whole[:-4])
    (again,) = fill(base, [view], folder)
    assert torch.equal(again.mean, made.mean)
    assert torch.equal(cache.get(folder, path.stem)["mean"], made.mean)


def test_an_entry_under_a_false_name_is_not_believed(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(base, [view_of(noisy(tmp_path / "a.png"))], folder)
    (path,) = folder.rglob("*.safetensors")
    false = cache.entry_path(folder, "0" * 64)
    false.parent.mkdir(parents=True, exist_ok=True)
    path.rename(false)
    assert cache.get(folder, "0" * 64) is None
    assert not false.exists()


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_a_kill_while_writing_leaves_nothing_that_is_believed(tiny_base: Path, tmp_path: Path, moment: str) -> None:
    script = f"""
        import os, sys
        from pathlib import Path
        import torch
        from sdlora import cache
        honest = Path.write_bytes
        def dying(self, content, *rest):
            if {moment!r} == "write_bytes":
                honest(self, content[: len(content) // 2])
            os._exit(9)
        setattr(Path, {moment!r}, dying)
        cache.put(Path(sys.argv[1]), "ab" * 32, {{"mean": torch.ones(4, 4)}})
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=False, cwd=Path(__file__).parent.parent)
    assert process.returncode == 9
    assert cache.get(tmp_path, "ab" * 32) is None
    assert cache.put(tmp_path, "ab" * 32, {"mean": torch.ones(4, 4)})
    kept = cache.get(tmp_path, "ab" * 32)
    assert kept is not None
    assert torch.equal(kept["mean"], torch.ones(4, 4))


def test_two_processes_fill_one_cache_at_once(tiny_base: Path, tmp_path: Path, base: Base) -> None:
    pictures = [noisy(tmp_path / f"{i}.png", i) for i in range(12)]
    script = """
        import sys
        from pathlib import Path
        import torch
        from sdlora import base_files, cache
        from tests.test_cache import fill, view_of
        torch.set_num_threads(1)
        base = base_files.load(sys.argv[1], device=torch.device("cpu"), dtype=torch.float32)
        fill(base, [view_of(Path(path)) for path in sys.argv[3:]], Path(sys.argv[2]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tiny_base), str(tmp_path / "cache"), *map(str, pictures)]
    both = [subprocess.Popen(command, cwd=Path(__file__).parent.parent) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    views = [view_of(path) for path in pictures]
    for kept, view in zip(fill(base, views, tmp_path / "cache"), views, strict=True):
        (fresh,) = fill(base, [view], None)
        torch.testing.assert_close(kept.mean, fresh.mean, atol=1e-5, rtol=1e-4)  # the other process may count its threads otherwise
    assert len(names(tmp_path / "cache")) == 12
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_latents_that_are_not_finite_are_never_kept(base: Base, tmp_path: Path) -> None:
    with torch.no_grad():
        base.vae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"a\.png gives latents that are not finite"):
        fill(base, [view_of(noisy(tmp_path / "a.png"))], tmp_path / "cache")
    assert names(tmp_path / "cache") == set()


def test_an_unreadable_picture_is_named_in_its_turn(base: Base, tmp_path: Path) -> None:
    views = [view_of(noisy(tmp_path / f"{i}.png", i)) for i in range(4)]
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])
    seen = []
    made = cache.latents(base, views, folder=None, background=WHITE)
    with pytest.raises(UserError, match=r"2\.png"):
        seen.extend(made)
    assert len(seen) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(base: Base, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    (made,) = fill(base, [view_of(noisy(tmp_path / "a.png"))], tmp_path / "cache")
    assert torch.isfinite(made.mean).all()


def test_trim_takes_the_longest_unused_and_clear_takes_only_entries(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for number in range(4):
        key = f"{number:02d}" * 32
        cache.put(folder, key, {"mean": torch.full((1000,), float(number))})
        os.utime(cache.entry_path(folder, key), (1000 + number, 1000 + number))
    (folder / "notes.txt").write_text("mine")
    (folder / "00" / "notes.txt").write_text("mine too")
    assert cache.info(folder).entries == 4
    assert cache.trim(folder, most_bytes=cache.info(folder).bytes // 2) == 2
    assert {path.stem[:2] for path in folder.rglob("*.safetensors")} == {"02", "03"}
    assert cache.trim(folder, most_bytes=0, since_s=1003) == 1
    assert cache.clear(folder).entries == 1
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"notes.txt"}
    assert (folder / "00" / "notes.txt").exists()
