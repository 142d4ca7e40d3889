"""What an attacker would type and upload: 200 strings and 50 files, made from a place that must stay as it is."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

SECRET = "this-word-lies-outside-4f1c"


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def strings(outside: Path) -> list[str]:
    """200 hostile strings; those that would write or run anything would do it in `outside`."""
    canary, secret = outside / "canary", outside / "secret.txt"
    depth = "../" * 12
    traversal = [
        "..", ".", "../", "../..", "../../etc/passwd", f"{depth}etc/passwd", f"{depth}{str(secret)[1:]}", "../secret.txt",
        "..\\..\\secret.txt",
        "loras/../../secret.txt", "....//....//secret.txt", "..%2f..%2fsecret.txt", "%2e%2e/%2e%2e/secret.txt", "..%252fsecret.txt",
        "..%c0%afsecret.txt", "..;/secret.txt", "./../x", "x/../../y", "x\\..\\..\\y", "../runs/cups", "../x.safetensors", "a/b", "a\\b",
        "a/./b", "//", "\\", "/", "~", "~/.ssh/id_rsa", "~root", "$HOME", "%USERPROFILE%", "${HOME}/x", "..\u2215..\u2215x", "\u2025/x",
        "\uff0e\uff0e/x", "..\x00/x", "x/..", " ../x", "../x ", "\t../x", "...", ". .", "../\n../x", ".git/config", ".ssh", "-/../x",
    ]  # fmt: skip
    absolute = [
        "/etc/passwd", "/etc/shadow", str(secret), str(outside), str(outside / "new.safetensors"), str(outside / "made"),
        "/proc/self/environ",
        "/proc/self/fd/0", "/dev/zero", "/dev/stdin", "/dev/tty", "/root/x", "//etc/passwd", "C:\\Windows\\win.ini", "C:/Windows/win.ini",
        "c:x", "\\\\server\\share\\x", "//server/share/x", "\\\\?\\C:\\x", "\\\\.\\PhysicalDrive0", f"file://{secret}",
        "file:///etc/passwd",
        "http://127.0.0.1:9/x", "https://127.0.0.1:9/x", "ftp://127.0.0.1/x", "data:text/html,<script>alert(1)</script>",
        "javascript:alert(1)", "smb://x/y", "jar:file:///x!/y",
    ]  # fmt: skip
    nul = [
        "\0", "x\0", "\0x", "x\0.safetensors", "x.safetensors\0.png", "a\nb", "a\r\nb", "\n", "\r", "x\n--flag", "a\tb", "\x1b[31mred",
        "\x07",
        "\x7f", "\x08\x08", "x\x0by", "a\u2028b", "a\u2029b", "\ufeffx", "\x85",
    ]  # fmt: skip
    shell = [
        f"$(touch {canary})", f"`touch {canary}`", f"; touch {canary}", f"| touch {canary}", f"&& touch {canary}", f"x; touch {canary} #",
        f"'; touch {canary}; '", f'"; touch {canary}; "', f"x\ntouch {canary}\n", f"$(touch${{IFS}}{canary})", f"%0atouch {canary}",
        f"__import__('os').system('touch {canary}')", f"{{{{__import__('os').system('touch {canary}')}}}}", f"!touch {canary}",
        f"eval(open('{secret}').read())", f"{{0.__class__.__init__.__globals__}}{canary}", "{x.__class__}", "%(x)s", "%s%s%s%n", "{}",
        "{0}",
        "${7*7}", "{{7*7}}", "<%= 7*7 %>", "#{7*7}", f"@{secret}", f"< {secret}", f"> {outside / 'made'}", f">> {secret}", "*", "?",
        "[a-z]",
        "x; rm -rf .", "& calc", "^", "|", ";", "&", "$", "`", "'", '"', "\\'", "';--", "' OR '1'='1", "1; DROP TABLE x",
    ]  # fmt: skip
    flags = ["-", "--", "--flag", "--out", f"--out={outside / 'made'}", f"-o{outside / 'made'}", "--help", "-rf", "--push-to-hub", "-c"]
    html = [
        "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "<b>x</b>", "</div><script>x</script>",
        '"><script>alert(1)</script>', "'><img src=x onerror=alert(1)>", "<iframe src=javascript:alert(1)>",
        "<a href=javascript:alert(1)>x</a>",
        "<style>*{display:none}</style>", "<ScRiPt>alert(1)</sCrIpT>", "<script\n>alert(1)</script>", "<img/src=x/onerror=alert(1)>",
        "&lt;script&gt;alert(1)&lt;/script&gt;", "<!--", "]]>", "<math><mi>x", "<body onload=alert(1)>", "${alert(1)}",
        "[x](javascript:alert(1))",
        "![x](x onerror=alert(1))", "<details open ontoggle=alert(1)>", "<script src=//127.0.0.1:9/x.js>", "onerror=alert(1)//",
    ]  # fmt: skip
    devices = ["con", "CON", "nul", "NUL.safetensors", "aux", "prn", "com1", "COM9.txt", "lpt1", "LPT9", "conin$", "CLOCK$:"]
    odd = [
        "", " ", "x" * 256, "x" * 5000, "../" * 1000, "가" * 300, "\u202egnp.exe", "x\u202e", "\u2066x\u2069", "\u200b", "\u200d",
        "\ud800", "x\udfff", "\ud800\udc00x/", "\U0010ffff", "e\u0301/", "<" * 3000, "{" * 500, "🙂/", "😀" * 100 + "/", ".hidden",
        "x.", "x ..", "x:stream", "a:b", "<lora:x:1>", "x,y", "NaN/", "null\0", "[]", '{"path": "/etc/passwd"}',
    ]  # fmt: skip
    found = list(dict.fromkeys(traversal + absolute + nul + shell + flags + html + devices + odd))
    assert len(found) >= 200, len(found)
    return found


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of that format with any header, or any bytes in its place, and any stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def png(width: int, height: int) -> bytes:
    """A black PNG of one bit per pixel: 30,000 x 30,000 are 110 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(squeeze.compress(row * 100) for _ in range(height // 100)) + squeeze.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def zipped(name: str, content: bytes) -> bytes:
    """A zip with one file in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def uploads(outside: Path, sound: bytes) -> list[tuple[str, bytes]]:
    """50 hostile files by name.

    Args:
        sound: a LoRA file as it should be.
    """
    canary = outside / "canary"
    evil = [pickle.dumps(Evil(canary), protocol) for protocol in range(6)]
    torch_file = io.BytesIO()
    torch.save({"x": Evil(canary)}, torch_file)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
    page = b"<html><script>alert(1)</script></html>"
    small = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(small, "PNG")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    zeros = bytes(1 << 24)
    inside: list[tuple[str, bytes]] = [
        *((f"pickle{i}.safetensors", content) for i, content in enumerate(evil)),
        ("torch.safetensors", torch_file.getvalue()), ("model.ckpt", evil[4]), ("model.pt", torch_file.getvalue()), ("x.pkl", evil[2]),
        ("empty.safetensors", b""), ("short.safetensors", b"\x08"), ("text.safetensors", b"hello, this is no such file"),
        *((f"torn{i}.safetensors", sound[: len(sound) * i // 5]) for i in range(1, 5)), ("more.safetensors", sound + b"x" * 9),
        ("10gb.safetensors", safetensors(b"{}", length=10 << 30)), ("huge.safetensors", safetensors(b"{}", length=(1 << 64) - 1)),
        ("negative.safetensors", safetensors({"a": entry | {"data_offsets": [8, 0]}}, bytes(8))),
        ("shape.safetensors", safetensors({"a": entry | {"shape": [1 << 62]}}, bytes(8))),
        ("overlap.safetensors", safetensors({"a": entry, "b": entry}, bytes(8))),
        ("deep.safetensors", safetensors(b'{"a":' + b"[" * 100_000, bytes(8))), ("list.safetensors", safetensors([1, 2], bytes(8))),
        ("twice.safetensors", safetensors(b'{"a":{},"a":{}}', bytes(8))), ("junk.safetensors", safetensors(b"{'a': 1}", bytes(8))),
        ("nan.safetensors", save({"lora_unet_x.lora_down.weight": torch.full((2, 2), torch.nan)})),
        ("other.safetensors", save({"weight": torch.zeros(2, 2)})), ("bomb.safetensors", zipped("x.safetensors", zeros)),
        ("bomb.zip", zipped("../../x.safetensors", zeros)), ("bomb.gz", gzip.compress(zeros)), ("gz.safetensors", gzip.compress(sound)),
        ("picture.svg", svg), ("svg.png", svg), ("svg.safetensors", svg), ("page.html", page), ("page.png", page),
        ("wide.png", png(30_000, 30_000)), ("wide.safetensors", png(30_000, 30_000)),
        ("both.png", small.getvalue() + page), ("both.gif", b"GIF89a/*" + page + b"*/=1;"), ("zip.png", small.getvalue() + zipped("x",
        page)),
        ("png.safetensors", small.getvalue()), ("numpy.safetensors", npy(canary)), ("script.safetensors",
        b"#!/bin/sh\ntouch " + str(canary).encode()),
    ]  # fmt: skip
    names = [
        "../../escaped.safetensors", "..\\..\\escaped.safetensors", str(outside / "escaped.safetensors"), "a\nb.safetensors",
        "<img src=x onerror=alert(1)>.safetensors", "--flag.safetensors", "con.safetensors", "x" * 300 + ".safetensors",
        "\u202esrosnetefas.safetensors", "$(touch x).safetensors", ".hidden.safetensors",
    ]  # fmt: skip
    found = [*inside, *((name, sound) for name in names)]
    assert len(found) >= 50, len(found)
    return found


def npy(canary: Path) -> bytes:
    """A numpy file that holds a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()
