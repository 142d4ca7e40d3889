"""A stranger's .safetensors file: read exactly or refused in one sentence, whatever its bytes are, in bounded memory and time."""

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sdlora import weights_file
from sdlora.errors import UserError

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def small_lora() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.lora_down.weight": torch.randn(2, 3, generator=generator),
        f"{STEM}.lora_up.weight": torch.randn(4, 2, generator=generator).half(),
        f"{STEM}.alpha": torch.tensor(2.0, dtype=torch.bfloat16),
    }


def written(folder: Path, content: bytes, name: str = "x.safetensors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: Any = (2,), span: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def refusal(path: Path, **options: Any) -> str:
    """What the person is told: one sentence on one line."""
    with pytest.raises(UserError) as problem:
        weights_file.read(path, **options)
    said = str(problem.value)
    assert said.endswith((".", "!")) and "\n" not in said and ". " not in said.replace(str(path), "")  # noqa: PT018
    return said


def test_tensors_and_metadata_come_back_exactly_as_they_were_written(tmp_path: Path) -> None:
    tensors = small_lora() | {
        "whole": torch.arange(6).reshape(2, 3),
        "flags": torch.tensor([True, False, True]),
        "tiny": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"ss_output_name": "Ü", "empty": ""})
    back = weights_file.read(path)
    assert back.metadata == {"ss_output_name": "Ü", "empty": ""}
    assert back.tensors.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert back.tensors[name].dtype == wanted.dtype
        assert torch.equal(back.tensors[name].double(), wanted.double())


def test_a_header_is_known_without_reading_the_weights(tmp_path: Path) -> None:
    big = 1 << 36  # 64 GiB, of which the disk holds only the header
    path = written(tmp_path, with_header({"w": tensor((big // 4,), (0, big)), "__metadata__": {"a": "b"}}))
    os.truncate(path, path.stat().st_size + big)
    tracemalloc.start()
    header = weights_file.header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert header.tensors == {"w": weights_file.Entry("F32", (big // 4,), 0, big)}
    assert header.metadata == {"a": "b"}
    assert path.stat().st_size == header.data_start + big


@pytest.mark.parametrize("shift", range(1, 8))
def test_a_header_of_any_length_is_read_though_weights_then_stand_at_odd_places(tmp_path: Path, shift: int) -> None:
    content = safetensors.torch.save(small_lora())
    (length,) = struct.unpack("<Q", content[:8])
    padded = struct.pack("<Q", length + shift) + content[8 : 8 + length] + b" " * shift + content[8 + length :]
    back = weights_file.read(written(tmp_path, padded)).tensors
    assert all(torch.equal(back[name], wanted) for name, wanted in small_lora().items())


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.PTH", "x.bin", "x.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_opened_under_any_name_and_the_way_out_is_said(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save({"w": torch.zeros(64)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    said = refusal(tmp_path / name)
    assert "is a pickle" in said
    assert "save it as .safetensors with the tool that made it" in said


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    content = safetensors.torch.save({"w": torch.ones(2)})
    (length,) = struct.unpack("<Q", content[:8])
    wanted = 0x0280  # written first are the bytes 80 02, with which pickles begin
    padded = struct.pack("<Q", wanted) + content[8 : 8 + length] + b" " * (wanted - length) + content[8 + length :]
    assert torch.equal(weights_file.read(written(tmp_path, padded)).tensors["w"], torch.ones(2))


def test_what_is_no_file_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "is a folder" in refusal(tmp_path / "folder.safetensors")
    for name in ("loop", "dangling", "pipe", "missing", "null\0byte"):
        assert "does not exist or is no ordinary file" in refusal(tmp_path / f"{name}.safetensors")
    assert "cannot be opened" in refusal(tmp_path / ("x" * 5000 + ".safetensors"))
    assert "is not a .safetensors file" in refusal(written(tmp_path, b"GIF", "x.gif"))


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "zero length": (b"", "ends after 0 bytes"),
    "seven bytes": (b"\0" * 7, "ends after 7 bytes"),
    "length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "9,223,372,036,854,775,808 bytes long, but the whole file has 10"),
    "length of 0": (struct.pack("<Q", 0) + b"{}", "no header follows"),
    "text": (b"version https://git-lfs.github.com/spec/v1", "header would be"),
    "no object": (with_header(b"[1, 2]"), "no header follows"),
    "broken JSON": (with_header(b'{"a": '), "header cannot be read"),
    "not UTF-8": (with_header(b'{"\xff\xfe": 1}'), "header cannot be read"),
    "UTF-16": (with_header('{"a": 1}'.encode("utf-16-le")), "header cannot be read"),
    "two objects": (with_header(b"{}{}"), "header cannot be read"),
    "deep nesting": (with_header(DEEP), "nested too deeply"),
    "many brackets": (with_header(b'{"a":[' + b"[]," * 300_000 + b"[]]}"), "more than 262,144 brackets"),
    "a number of 5,000 digits": (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "header cannot be read"),
    "duplicate keys": (with_header(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(8)), "a stands there 2 times"),
    "duplicate fields": (with_header(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)), "shape stands"),
    "metadata with a number": (with_header({"__metadata__": {"a": 1}}), "metadata is not"),
    "metadata as a list": (with_header({"__metadata__": []}), "metadata is not"),
    "metadata with half a character": (with_header(b'{"__metadata__": {"a": "\\ud800"}}'), "metadata is not"),
    "name with half a character": (with_header(b'{"\\ud800": {}}'), "is named '\\ud800'"),
    "name of 9,000 characters": (with_header({"a" * 9000: tensor()}, bytes(8)), "1 to 500 characters"),
    "empty name": (with_header({"": tensor()}, bytes(8)), "1 to 500 characters"),
    "tensor is no object": (with_header({"a": [1]}), "dtype that is not text"),
    "no offsets": (with_header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "data_offsets"),
    "unknown dtype": (with_header({"a": tensor(dtype="F33")}, bytes(8)), "a dtype 'F33', and F64, F32"),
    "wrong dtype": (with_header({"a": tensor(dtype="F16")}, bytes(8)), "does not fit the bytes"),
    "dtype is a list": (with_header({"a": tensor(dtype=["F32"])}, bytes(8)), "dtype that is not text"),
    "negative shape": (with_header({"a": tensor((-2,))}, bytes(8)), "not a list of up to 8 counts"),
    "two negative sizes": (with_header({"a": tensor((-2, -1))}, bytes(8)), "not a list of up to 8 counts"),
    "fractional shape": (with_header({"a": tensor((2.0,))}, bytes(8)), "not a list of up to 8 counts"),
    "true as a size": (with_header({"a": tensor((True, 2))}, bytes(8)), "not a list of up to 8 counts"),
    "nine axes": (with_header({"a": tensor((1,) * 8 + (2,))}, bytes(8)), "not a list of up to 8 counts"),
    "huge shape": (with_header({"a": tensor((1 << 40, 1 << 40))}, bytes(8)), "more than 1,099,511,627,776 numbers"),
    "huge shape of size 0": (with_header({"a": tensor((1 << 62, 1 << 62, 0), (0, 0))}), "more than 1,099,511,627,776 numbers"),
    "shape of 4 GB in 8 bytes": (with_header({"a": tensor((1 << 30,))}, bytes(8)), "does not fit the bytes"),
    "offsets beyond the end": (with_header({"a": tensor((1 << 20,), (0, 1 << 22))}, bytes(8)), "8 of 4,194,304 bytes"),
    "offsets backwards": (with_header({"a": tensor(span=(8, 0))}, bytes(8)), "does not fit the bytes"),
    "negative offset": (with_header({"a": tensor(span=(-8, 0))}, bytes(8)), "data_offsets"),
    "three offsets": (with_header({"a": tensor(span=(0, 8, 16))}, bytes(8)), "data_offsets"),
    "overlapping offsets": (with_header({"a": tensor(), "b": tensor(span=(4, 12))}, bytes(12)), "'b' overlaps"),
    "the same offsets": (with_header({"a": tensor(), "b": tensor()}, bytes(8)), "'b' overlaps"),
    "a hole": (with_header({"a": tensor(), "b": tensor(span=(16, 24))}, bytes(24)), "'b' leaves a gap"),
    "a hole at the start": (with_header({"a": tensor(span=(8, 16))}, bytes(16)), "'a' leaves a gap"),
    "bytes left over": (with_header({"a": tensor()}, bytes(9)), "1 bytes at its end belong to no tensor"),
    "cut short": (safetensors.torch.save(small_lora())[:-1], "its end is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence_that_says_what_was_found(tmp_path: Path, name: str) -> None:
    content, sentence = HOSTILE[name]
    path = written(tmp_path, content)
    said = refusal(path)
    assert sentence in said
    assert str(path) in said
    assert len(said) < 400 + len(str(path))


def test_a_name_cannot_write_control_characters_to_the_terminal(tmp_path: Path) -> None:
    said = refusal(written(tmp_path, with_header({"\x1b[31m\nred": tensor((3,))}, bytes(8))))
    assert said.isprintable()


def test_a_header_of_100_mb_is_refused_without_being_read(tmp_path: Path) -> None:
    path = written(tmp_path, struct.pack("<Q", 100 << 20) + b"{")
    os.truncate(path, (100 << 20) + 8)
    tracemalloc.start()
    assert "104,857,600 bytes is longer than the 16,777,216" in refusal(path)
    with pytest.raises(UserError, match="longer than the 67,108,864"):
        weights_file.header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_worst_header_within_the_limit_costs_at_most_forty_times_its_size(tmp_path: Path) -> None:
    limit = 1 << 20
    text = b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(limit // 11)) + b'},"a":1}'
    path = written(tmp_path, with_header(text))
    tracemalloc.start()
    refusal(path, limit_bytes=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_unless_asked_for(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    path = tmp_path / "x.safetensors"
    broken = torch.tensor([0.0, value, 1.0]).to(dtype)
    safetensors.torch.save_file({"fine": torch.ones(3), "none": torch.ones(0), "broken": broken}, path)
    assert "holds NaN or infinity in 'broken'" in refusal(path)
    assert weights_file.read(path, finite=False).tensors.keys() == {"fine", "none", "broken"}


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A file after one of a few kinds of damage: cut, bytes changed, put in or taken out of its first 700, or numbers exchanged."""
    (length,) = struct.unpack("<Q", content[:8])
    place = chance.randrange(min(len(content), 700))
    kind = chance.randrange(6)
    if kind == 0:
        return content[: chance.randrange(len(content))]
    if kind == 1:
        return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + chance.randbytes(chance.randrange(1, 9)) + content[place:]
    if kind == 3:
        return content[:place] + content[place + chance.randrange(1, 9) :]
    text, data = content[8 : 8 + length], content[8 + length :]
    digits = [i for i, byte in enumerate(text) if chr(byte).isdigit()]
    for _ in range(chance.randrange(1, 4)):
        at = chance.choice(digits)
        text = text[:at] + chance.choice([b"0", b"9", b"-1", b"1e9", b"99999999999", b"", b"null"]) + text[at + 1 :]
    return struct.pack("<Q", len(text) if kind == 4 else length) + text + data


def outcome(path: Path) -> weights_file.Weights | str:
    """What was read, or what the person is told; any other exception fails the test."""
    try:
        return weights_file.read(path)
    except UserError as problem:
        return str(problem)


def test_a_thousand_damaged_files_are_read_rightly_or_refused_in_one_sentence(tmp_path: Path) -> None:
    content = safetensors.torch.save(small_lora() | {"n": torch.arange(3)}, metadata={"ss_output_name": "x", "ss_steps": "12"})
    sound = safetensors.torch.load(content)
    refused = 0
    tracemalloc.start()
    for seed in range(1000):
        damaged = mutated(content, random.Random(seed))
        path = written(tmp_path, damaged)
        back = outcome(path)
        if isinstance(back, str):
            refused += 1
            assert str(path) in back and "\n" not in back, seed  # noqa: PT018
            continue
        size = sum(one.numel() * one.element_size() for one in back.tensors.values())
        assert size == sum(one.numel() * one.element_size() for one in sound.values()) == len(content) - weights_start(content), seed
        assert set(map(type, (*back.metadata, *back.metadata.values()))) <= {str}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert 700 < refused < 1000  # some damage leaves a sound file: another name, another number


def weights_start(content: bytes) -> int:
    return 8 + int(np.frombuffer(content[:8], "<u8")[0])
