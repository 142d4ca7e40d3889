"""States to go on from: exact to the bit, whole or not there, and damage is found before anything is believed."""

import errno
import io
import math
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdlora import checkpoint, files, optimizer
from sdlora.checkpoint import State
from sdlora.errors import UserError

CORRUPTIONS, CLEAN_LOADS = 2_000, 1_000
PACKAGES = {"lion": "lion_pytorch", "prodigy": "prodigyopt", "schedule_free": "schedulefree", "adamw8bit": "bitsandbytes"}
FILES = {"average.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors"}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(step: int = 200, *, note: str = "") -> State:
    weights = {"down": drawn(2, 5, seed=step), "attn.up": drawn(3, 2, seed=step + 1)}
    held = {0: {"step": torch.tensor(float(step)), "exp_avg": drawn(2, 5, seed=step + 2)}, 1: {"step": torch.tensor(float(step))}}
    optimizer_state = {"state": held, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}]}
    average = [drawn(2, 5, seed=step + 3), drawn(3, 2)]
    return State(step, weights, average, optimizer_state, {"version": "1", "note": note})


def assert_same(one: Any, other: Any) -> None:
    """Equal in type and order, tensors and floats to the bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
    elif isinstance(one, State):
        assert_same(vars(one), vars(other))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert repr(one) == repr(other)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushes are asked for and counted, but not waited for: what a killed process has written is there all the same."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def put(path: Path, content: bytes) -> None:
    """Overwrites in place: ext4 waits for the disk when a file is emptied first."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- exact --------------------------------------------------------------------------------------------------------------------


def made(name: str, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate = 1.0 if name == "prodigy" else 1e-2
    return optimizer.make(name, [(weights[:1], rate), (weights[1:], rate)], weight_decay=0.01)


def take_steps(mover: torch.optim.Optimizer, weights: list[nn.Parameter], *, first: int) -> None:
    """Three steps with gradients that depend on the step alone."""
    for step in range(first, first + 3):
        for number, weight in enumerate(weights):
            weight.grad = drawn(*weight.shape, seed=10 * step + number)
        mover.step()


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_an_optimizer_goes_on_from_a_state_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    weights = [nn.Parameter(drawn(80, 64)), nn.Parameter(torch.zeros(64, 80)), nn.Parameter(torch.zeros(7))]
    mover = made(name, weights)
    take_steps(mover, weights, first=0)
    here = State(3, {str(i): weight.detach() for i, weight in enumerate(weights)}, [], mover.state_dict(), {})
    back = checkpoint.read(checkpoint.write(tmp_path, here))
    assert_same(back, here)

    take_steps(mover, weights, first=3)
    weights_again = [nn.Parameter(weight) for weight in back.weights.values()]
    mover_again = made(name, weights_again)
    mover_again.load_state_dict(back.optimizer)
    take_steps(mover_again, weights_again, first=3)
    assert_same(weights_again, weights)
    assert_same(mover_again.state_dict(), mover.state_dict())


def test_what_json_cannot_say_comes_back_in_type_order_and_bits(tmp_path: Path) -> None:
    table = drawn(256)
    held = {
        "quantised": {"codes": torch.arange(6, dtype=torch.uint8), "table": table, "nested": {"table": table}},  # shared, as 8-bit Adam's
        "tensors": [torch.tensor(2.0), torch.zeros(0, 3), drawn(4, 6).T, drawn(3).bfloat16(), torch.tensor([math.nan, -0.0]), table.bool()],
        "numbers": [0.1, 1e-308, -0.0, 5e-324, math.inf, -math.inf, math.nan, 2**70, True, None, 1, 1.0],
        "pairs": ((), (1, (2.0, None)), [(), []]),
        "keys": {1: "a", "1b": "b", 0: {"$tensor": "no tensor"}},
        "words": "Ü \n \ud800",
    }
    whole = State(7, {"z": drawn(1), "a": drawn(1)}, [], held, {"scaler": {"scale": 65536.0}, "versions": ("1", None)})
    assert_same(checkpoint.read(checkpoint.write(tmp_path, whole)), whole)


@pytest.mark.parametrize(
    ("facts", "words"),
    [({"x": {1, 2}}, "x, a set"), ({"x": [Path()]}, "x/0, a PosixPath"), ({"x": torch.ones(1)}, "plain values"), ({(1,): 0}, "a dict")],
)
def test_what_no_state_can_hold_is_our_mistake_and_leaves_no_file(facts: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=words):
        checkpoint.write(tmp_path / "state", State(1, {}, [], {}, facts))
    assert list(tmp_path.iterdir()) == []


def test_equal_states_have_equal_bytes_and_nothing_is_a_pickle(tmp_path: Path) -> None:
    one, other = (contents(checkpoint.write(tmp_path / name, state())) for name in "ab")
    assert one == other
    assert set(one) == FILES


# --- a disk that fails --------------------------------------------------------------------------------------------------------


@contextmanager
def at_call(number: int, do: Callable[[], None], *, after: bool = False, deletes: bool = False) -> Iterator[list[str]]:
    """Lists every call that changes the disk; at the one of this number something else happens, before or after it; writes half."""
    seen: list[str] = []

    def counted(name: str, call: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def counting(*args: Any, **more: Any) -> Any:
            if name == "os.open" and "dir_fd" in more:  # a folder that is being deleted is looked through
                return call(*args, **more)
            seen.append(name)
            mine = len(seen) == number
            if mine and not after:
                if half is not None:
                    half(*args)
                do()
            answer = call(*args, **more)
            if mine and after:
                do()
            return answer

        return counting

    def opened(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if "w" not in mode:
            return real_open(path, mode, *args, **more)
        file = counted("open", real_open)(path, mode, *args, **more)
        return Watched(file, counted)

    real_open, names = io.open, ["mkdir", "rename", "replace", "open", "fsync", *(["unlink", "rmdir"] if deletes else [])]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(f"os.{name}", getattr(os, name)))
        patch.setattr(io, "open", opened)
        yield seen


class Watched:
    """An open file whose writes, flushes and closing are counted."""

    def __init__(self, file: Any, counted: Callable[..., Any]) -> None:
        self.file, self.fileno = file, file.fileno
        self.write = counted("write", file.write, lambda content: (file.write(content[: len(content) // 2]), file.flush()))
        self.flush, self.close = counted("flush", file.flush), counted("close", file.close)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self.file.close()


def failing(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


CALLS = 1 + 4 * 5 + 2 + 1 + 2  # the folder, its four files, opened and flushed itself, its name, and the folder of that name flushed


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk full", "disk broken"])
@pytest.mark.parametrize("kept", [100, 200], ids=["a new step", "the same step again"])
def test_a_save_that_fails_at_any_call_leaves_what_was_there_and_says_so_in_a_sentence(code: int, kept: int, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "state"
    checkpoint.write(folder, state(kept, note="before"))
    before = contents(folder)
    for number in count(1):
        with at_call(number, failing(code)) as seen:
            if number > CALLS + (kept == 200):  # what stood there is given another name first; deleting it later may fail
                checkpoint.write(folder, state(note="after"))
                break
            with pytest.raises(UserError) as caught:
                checkpoint.write(folder, state(note="after"))
        assert len(seen) >= number
        assert contents(folder) == before
        assert [path.name for path in folder.iterdir()] == [f"{kept:06d}"]
        told = str(caught.value)
        assert told.startswith("The state of step 200 could not be saved: ")
        assert f"({os.strerror(code)}); the states saved before are intact" in told
        assert str(folder) in told
        assert f"--resume {tmp_path / 'run'}." in told
        assert "\n" not in told
    assert checkpoint.read(checkpoint.path_of(folder, 200)).facts["note"] == "after"
    checkpoint.tidy(folder, keep_last=5, keep_every=0)
    assert sorted(path.name for path in folder.iterdir()) == sorted({f"{kept:06d}", "000200"})


@pytest.mark.usefixtures("hasty")
def test_a_first_save_that_fails_leaves_no_file(tmp_path: Path) -> None:
    for number in count(1):
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        with at_call(number, failing(errno.ENOSPC)) as seen:
            if number == 4 + CALLS:  # the folder of states is made and made known besides
                checkpoint.write(tmp_path / "state", state())
                break
            with pytest.raises(UserError, match="could not be saved"):
                checkpoint.write(tmp_path / "state", state())
        assert len(seen) >= number
        assert contents(tmp_path) == {}
    assert checkpoint.newest(tmp_path / "state")[0] is not None


@pytest.mark.usefixtures("hasty")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
@pytest.mark.parametrize("kept", [100, 200], ids=["a new step", "the same step again"])
def test_a_process_killed_at_any_call_leaves_a_good_state_and_the_next_save_cleans_up(kept: int, after: bool, tmp_path: Path) -> None:
    outcomes = []
    for number in count(1):
        folder = tmp_path / str(number)
        checkpoint.write(folder, state(kept, note="before"))
        child = os.fork()
        if not child:
            with at_call(number, lambda: os._exit(9), after=after, deletes=True):
                checkpoint.write(folder, state(note="after"))
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        found, damaged = checkpoint.newest(folder)
        assert found is not None
        assert damaged == []
        outcomes.append(found.facts["note"])
        assert_same(found, state(found.step, note=found.facts["note"]))
        checkpoint.write(folder, state(note="next"))
        assert checkpoint.tidy(folder, keep_last=9, keep_every=0) == []
        assert sorted(path.name for path in folder.iterdir()) == sorted({f"{kept:06d}", "000200"})
        assert_same(checkpoint.newest(folder)[0], state(note="next"))
    assert len(outcomes) >= CALLS + (7 if kept == 200 else 0)  # the earlier save given two names and deleted, file by file
    assert sorted(outcomes, reverse=True) == outcomes  # first what was before, from one call on what came after
    assert set(outcomes) == {"before", "after"}


# --- damage -------------------------------------------------------------------------------------------------------------------


def corrupted(content: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(content)), chance.randint(1, 8)
    return chance.choice(
        [
            content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
            content[:at] + chance.randbytes(size) + content[at + size :],
            content[:at],
            content[:at] + content[at + size :],
            content[:at] + bytes(size) + content[at:],
        ]
    )


@pytest.mark.usefixtures("hasty")
def test_corruptions_are_found_and_the_run_goes_on_from_the_state_before_and_clean_loads_raise_no_alarm(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(200))
    whole = contents(checkpoint.write(tmp_path, state(400)))
    chance, missed = random.Random(7), 0
    for number in range(CORRUPTIONS):
        name = sorted(whole)[number % len(whole)]
        path = checkpoint.path_of(tmp_path, 400) / name
        broken = next(other for _ in count() if (other := corrupted(whole[name], chance)) != whole[name])
        put(path, broken)
        found, told = checkpoint.newest(tmp_path)
        missed += found is None or found.step != 200 or len(told) != 1 or name not in told[0]
        put(path, whole[name])
    assert missed <= 0.0005 * CORRUPTIONS
    alarms = 0
    for _ in range(CLEAN_LOADS):
        found, told = checkpoint.newest(tmp_path)
        alarms += found is None or found.step != 400 or told != []
    assert alarms == 0


@pytest.mark.usefixtures("hasty")
def test_every_byte_of_the_record_is_sealed_its_own_seal_too(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, state()) / "state.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        put(path, whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])  # other case, the smallest change to hex digits
        with pytest.raises(UserError, match=r"state\.json is not what was written"):
            checkpoint.read(path.parent)


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_another_step_are_refused(name: str, tmp_path: Path) -> None:
    one, other = checkpoint.write(tmp_path, state(200)), checkpoint.write(tmp_path, state(400))
    shutil.copyfile(one / name, other / name)
    found, told = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, len(told)) == (200, 1)
    shutil.copytree(one, other, dirs_exist_ok=True)  # all of them
    with pytest.raises(UserError, match=r"000400 is damaged \(state\.json is that of step 200\)"):
        checkpoint.read(other)


def test_the_sentences_say_what_is_wrong_with_each_newer_state(tmp_path: Path) -> None:
    paths = [checkpoint.write(tmp_path, state(step)) for step in (100, 200, 300, 400, 500, 600)]
    (paths[1] / "weights.safetensors").unlink()
    (paths[2] / "more.safetensors").write_bytes(b"")
    size = (paths[3] / "optimizer.safetensors").stat().st_size
    os.truncate(paths[3] / "optimizer.safetensors", 9)
    shutil.rmtree(paths[4])
    paths[4].mkdir()
    shutil.rmtree(paths[5])
    paths[5].write_bytes(b"a file")
    assert checkpoint.newest(tmp_path)[1] == [
        "State of step 600 is damaged (state.json cannot be read, Not a directory); going on from step 100.",
        "State of step 500 is damaged (state.json is missing); going on from step 100.",
        f"State of step 400 is damaged (optimizer.safetensors has 9 bytes instead of {size:,}); going on from step 100.",
        "State of step 300 is damaged (more.safetensors is not part of it); going on from step 100.",
        "State of step 200 is damaged (weights.safetensors is missing); going on from step 100.",
    ]
    shutil.rmtree(paths[0])
    found, told = checkpoint.newest(tmp_path)
    assert found is None
    assert {line.partition("; ")[2] for line in told} == {"no state before it is whole."}
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def test_a_state_of_a_later_version_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = checkpoint.write(tmp_path, state())
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 2, and this version reads 1"):
        checkpoint.read(path)


def test_what_a_file_manager_leaves_in_a_state_does_not_cost_it(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, state())
    (path / ".DS_Store").write_bytes(b"x")
    assert_same(checkpoint.read(path), state())


def test_a_damaged_state_stays_and_does_not_keep_its_step_from_being_saved_again(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(200))
    path = checkpoint.write(tmp_path, state(400))
    (path / "weights.safetensors").write_bytes(b"")
    assert len(checkpoint.newest(tmp_path)[1]) == 1
    assert checkpoint.steps(tmp_path) == [200, 400]
    checkpoint.write(tmp_path, state(400, note="again"))
    found, told = checkpoint.newest(tmp_path)
    assert_same(found, state(400, note="again"))
    assert told == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["000200", "000400"]


# --- old ones -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "every", "stay"),
    [(1, 0, [600]), (2, 0, [500, 600]), (1, 300, [300, 600]), (2, 200, [200, 400, 500, 600]), (9, 0, [100, 200, 300, 400, 500, 600])],
)
def test_the_last_ones_and_every_so_many_steps_stay(last: int, every: int, stay: list[int], tmp_path: Path) -> None:
    for step in range(100, 700, 100):
        checkpoint.write(tmp_path, state(step))
    assert checkpoint.tidy(tmp_path, keep_last=last, keep_every=every) == []
    assert checkpoint.steps(tmp_path) == stay
    assert len(list(tmp_path.iterdir())) == len(stay)


def test_a_damaged_state_never_pushes_out_the_good_one(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        checkpoint.write(tmp_path, state(step))
    for step in (300, 400):
        (checkpoint.path_of(tmp_path, step) / "weights.safetensors").write_bytes(b"")
    checkpoint.tidy(tmp_path, keep_last=1, keep_every=0)
    assert checkpoint.steps(tmp_path) == [200, 300, 400]
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 200
    checkpoint.tidy(tmp_path, keep_last=2, keep_every=0)  # there is only one
    assert checkpoint.steps(tmp_path) == [200, 300, 400]


def test_leftovers_of_dead_writers_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state())
    dead = os.posix_spawnp("true", ["true"], os.environ)
    os.waitpid(dead, 0)
    for name in (f".000300.{dead}.part", f".000100.{dead}.gone", f".000300.{os.getppid()}.part", ".keep", "notes.txt"):
        (tmp_path / name).mkdir()
    checkpoint.tidy(tmp_path, keep_last=1, keep_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["000200", f".000300.{os.getppid()}.part", ".keep", "notes.txt"])


def test_an_old_state_that_cannot_be_deleted_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    for step in (100, 200):
        checkpoint.write(tmp_path, state(step))
    with at_call(1, failing(errno.EIO)):
        (told,) = checkpoint.tidy(tmp_path, keep_last=1, keep_every=0)
    assert str(checkpoint.path_of(tmp_path, 100)) in told
    assert checkpoint.tidy(tmp_path, keep_last=1, keep_every=0) == []
    assert checkpoint.steps(tmp_path) == [200]


# --- single files -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("number", range(2, 11))
def test_a_single_file_that_fails_at_any_call_is_the_earlier_one_or_said_to_be_written(number: int, tmp_path: Path) -> None:
    files.write(tmp_path / "x.bin", b"before")
    replaced, ends = number > 7, number > 9  # 1 makes the folder, 2 to 6 the file, 7 is its name, 8 and 9 flush the folder
    told = "was written, but the disk does not confirm it" if replaced else r"could not be written \(Input/output error\).*untouched"
    with at_call(number, failing(errno.EIO)) as seen, nullcontext() if ends else pytest.raises(UserError, match=told):
        files.write(tmp_path / "x.bin", b"after")
    assert len(seen) >= min(number, 9)
    assert contents(tmp_path) == {"x.bin": b"after" if replaced else b"before"}


def test_a_disk_that_cannot_flush_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    assert_same(checkpoint.read(checkpoint.write(tmp_path / "state", state())), state())
