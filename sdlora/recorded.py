"""A model's way there and back without the Python between its operations: they are noted once, and played from then on.

Asked the usual way, modules call modules, and autograd looks up for each operation what it means for the way back. With latents of one
size that comes to the same few thousand operations in every step, and beside the embedded base it is a quarter of the time. So the first
step of each size is taken as ever while `Notes` writes down what arrives below autograd: each operation, what it is given, and what it
makes. The notes become two plain functions, one for each way, that do the same operations in the same order, so they end in the same
bits, and that let go of each tensor after its last use, as autograd does.

Dropouts, which decide anew in each step, and checkpointing, which computes again, go the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from sdlora import lora_flat
from sdlora.lora_adapters import Adapter
from sdlora.lora_flat import Flat

NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)  # the same numbers under another name


def record(model: nn.Module, flats: Sequence[Flat], adapters: Sequence[Adapter], dtype: torch.dtype) -> bool:
    """Lets a model play its training steps from now on, if they are the same operations each time.

    Args:
        model: a UNet or a text encoder; what it answers may depend on the shapes of what it is given and not on their numbers.
        flats: those that hold what is trained in it.
        adapters: all in it that are trained.
        dtype: of the base.

    Returns:
        Whether it does.
    """
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not flats or not adapters or checkpointed or any(one.drops for one in adapters):
        return False
    model.forward = partial(_forward, model, model.forward, flats, adapters, dtype, {})
    return True


def _forward(
    model: nn.Module,
    usual: Callable[..., Any],
    flats: Sequence[Flat],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    recordings: dict[Hashable, Played | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's answer; played where it learns and nobody watches the operations themselves."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, one in enumerate(leaves) if isinstance(one, Tensor)]
    given = [leaves[i] for i in places]
    form = (
        *((one.shape, one.stride(), one.dtype, one.requires_grad) if isinstance(one, Tensor) else one for one in leaves),
        *kwargs,
        *(one.strength for one in adapters),
    )
    learns = model.training and torch.is_grad_enabled() and not any(one.is_meta for one in given)
    if not learns or is_in_torch_dispatch_mode() or recordings.get(form, True) is None:
        return usual(*args, **kwargs)

    def ask(inputs: Sequence[Tensor]) -> Any:
        """What the model answers to other tensors in the place of these."""
        for i, one in zip(places, inputs, strict=False):
            leaves[i] = one
        again, more = tree_unflatten(leaves, spec)
        with lora_flat.spread(flats, adapters, dtype, wholes=inputs[len(given) :]):
            return usual(*again, **more)

    shape: list[TreeSpec] = []
    made = _Answer.apply(ask, recordings, form, shape, *given, *(flat.whole for flat in flats))  # type: ignore[no-untyped-call]
    return tree_unflatten(made, shape[0])


class _Answer(torch.autograd.Function):
    """A model's answer as one node of autograd, however much is in it."""

    @staticmethod
    def forward(
        ctx: Any, ask: Callable[[Sequence[Tensor]], Any], recordings: dict[Hashable, Played | None], form: Hashable, shape: list[TreeSpec],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Plays the way there, or goes it and notes it.

        Args:
            ask: the usual way.
            recordings: of each form of inputs that has been met.
            form: of these.
            shape: takes the structure of the answer.
            inputs: all that differs from step to step.

        Returns:
            The tensors of the answer.
        """
        ctx.set_materialize_grads(False)
        ctx.recordings, ctx.form, ctx.known = recordings, form, recordings.get(form)
        if ctx.known:
            answers, ctx.needed = ctx.known.there(list(inputs))
            shape.append(ctx.known.shape)
        else:
            ctx.leaves = [one.detach().requires_grad_(one.requires_grad) for one in inputs]
            ctx.notes = Notes(ctx.leaves)
            with torch.enable_grad(), ctx.notes:
                answers, ctx.shape = tree_flatten(ask(ctx.leaves))
            ctx.answers, ctx.turn = answers, len(ctx.notes.lines)
            shape.append(ctx.shape)
        return tuple(one.detach() for one in answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Plays the way back, or goes it and keeps what was noted on both ways."""
        asked = [i for i, one in enumerate(gradients) if one is not None]
        came = [one for one in gradients if one is not None]
        if ctx.known:
            assert ctx.known.asked == asked  # a run learns from the same answers in all of its steps
            return (None,) * 4 + tuple(ctx.known.back(ctx.needed, came))
        notes, wanted = ctx.notes, [one for one in ctx.leaves if one.requires_grad]
        names = [notes.new(one) for one in came]
        with notes:
            found = iter(torch.autograd.grad([ctx.answers[i] for i in asked], wanted, came, allow_unused=True))
        made = [next(found) if one.requires_grad else None for one in ctx.leaves]
        ends = ["None" if one is None else notes.name(one) for one in made]
        answers = [notes.name(one) for one in ctx.answers]
        ctx.recordings[ctx.form] = played(notes, ctx.turn, answers, names, ends, ctx.shape, asked) if notes.is_fit else None
        ctx.answers = ctx.notes = ctx.leaves = None
        return (None,) * 4 + tuple(made)


# --- noting -------------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One operation as Python: its code, the tensors that it reads, and those that it makes."""

    code: str
    reads: list[str]
    makes: list[str]


class Notes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations that are called while it is in force.

    Args:
        inputs: the tensors that differ from step to step. All others that were there before, such as frozen weights, are constants, which
            are kept themselves and not copied: a weight that is moved to another device is found there.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Any = WeakIdKeyDictionary()  # of tensors, as long as they are there
        self.constants: dict[int, tuple[str, object]] = {}
        self.lines: list[Line] = []
        self.is_fit, self._count = True, 0
        self.inputs = [self.new(one) for one in inputs]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func in SAME:
            self.names[answer] = self.name(args[0])
            return answer
        every = answer if isinstance(answer, (tuple, list)) else (answer,)
        self.is_fit &= _is_alike(func, args)
        reads: list[str] = []
        given = [self._code(one, reads) for one in args] + [f"{key}={self._code(one, reads)}" for key, one in (kwargs or {}).items()]
        makes = [
            self.new(one) if isinstance(one, Tensor) and one not in self.names else "_" for one in every
        ]  # "_": it was there, or is a size
        goal = f"[{', '.join(makes)}]" if isinstance(answer, (tuple, list)) else makes[0]
        self.lines.append(Line(f"{goal} = {self._constant(func._op)}({', '.join(given)})", reads, [one for one in makes if one != "_"]))
        return answer

    def new(self, tensor: Tensor) -> str:
        """Gives a tensor its name."""
        self._count += 1
        name = self.names[tensor] = f"t{self._count}"
        return name

    def name(self, tensor: Tensor) -> str:
        """What a tensor is called."""
        found: str | None = self.names.get(tensor)
        return self._constant(tensor) if found is None else found

    def _constant(self, value: object) -> str:
        return self.constants.setdefault(id(value), (f"c{len(self.constants)}", value))[0]

    def _code(self, value: Any, reads: list[str]) -> str:
        if isinstance(value, Tensor):
            reads.append(self.name(value))
            return reads[-1]
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(self._code(one, reads) for one in value)}]"
        return repr(value) if value is None or isinstance(value, (bool, int)) else self._constant(value)


def _is_alike(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation's answer is of one shape whatever numbers it is given, and is no number itself."""
    if func is torch.ops.aten.index.Tensor:
        return all(one is None or one.dtype != torch.bool for one in args[1])
    return NUMBERS.isdisjoint(func.tags)


# --- playing ------------------------------------------------------------------------------------------------------------------


class Played(NamedTuple):
    """What notes become.

    Args:
        there: from inputs to the answers and what the way back needs; it empties the list that it is given, as `back` does.
        back: from that and the gradients of some answers to those of the inputs.
        shape: the structure of the answers.
        asked: which of them the gradients are of.
    """

    there: Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]
    back: Callable[[list[Tensor], list[Tensor]], list[Tensor | None]]
    shape: TreeSpec
    asked: list[int]


def played(
    notes: Notes, turn: int, answers: Sequence[str], came: Sequence[str], gradients: Sequence[str], shape: TreeSpec, asked: list[int]
) -> Played:
    """The functions that do what was noted.

    Args:
        turn: how many of the lines are the way there.
        answers: the names of what it ends in.
        came: of what the way back begins with.
        gradients: of what that ends in, "None" for inputs without.
        shape, asked: see `Played`.
    """
    there, back = notes.lines[:turn], notes.lines[turn:]
    known = {*notes.inputs, *(name for line in there for name in line.makes)}
    needed = sorted(known & ({name for line in back for name in line.reads} | set(gradients)))
    constants = dict(notes.constants.values())
    source = [f"def play({', '.join(constants)}):"]
    source += _function("there(given)", [notes.inputs], there, [answers, needed])
    source += _function("back(given, came)", [needed, came], back, [gradients])
    source += [" return there, back"]
    made: dict[str, Any] = {}
    exec("\n".join(source), made)
    go, come = made["play"](**constants)
    return Played(go, come, shape, asked)


def _function(name: str, taken: Sequence[Sequence[str]], lines: Sequence[Line], ends: Sequence[Sequence[str]]) -> Iterator[str]:
    """The source of one way, which forgets each tensor after its last use.

    Args:
        taken: the names of what is in each list that it is given.
        ends: of what is in each list that it returns.
    """
    begun = [one for names in taken for one in names]
    last = dict.fromkeys(begun, -1) | {one: i for i, line in enumerate(lines) for one in (*line.makes, *line.reads) if one[0] == "t"}
    gone: dict[int, list[str]] = {}
    for one, i in last.items():
        if not any(one in names for names in ends):
            gone.setdefault(i, []).append(one)
    yield f" def {name}:"
    for given, names in zip(name[:-1].partition("(")[2].split(", "), taken, strict=True):
        yield f"  [{', '.join(names)}] = {given}; {given}.clear()"
    if -1 in gone:
        yield f"  del {', '.join(gone[-1])}"
    for i, line in enumerate(lines):
        yield f"  {line.code}" + (f"; del {', '.join(gone[i])}" if i in gone else "")
    yield f"  return {', '.join('[' + ', '.join(names) + ']' for names in ends)}"
