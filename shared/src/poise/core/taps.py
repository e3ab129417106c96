r"""Read what flows through a network, by module name, without touching the network.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> with Taps(model, "1") as taps:
...     loss = model(torch.ones(3, 4)).sum() + taps["1"].square().mean()
>>> loss.backward()
>>> model[0].weight.grad.shape
torch.Size([8, 4])

Names and patterns are those of :mod:`poise.core.names`: ``blocks.*.mlp``, ``**.relu``, the same for a wrapped model.
"""

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

from poise.core.names import match_modules

Select = int | str | Callable[[Any], Tensor]

_AUTOGRAD = ModuleTracker()  # never entered: asked only whether a backward pass is running


class Taps(Mapping[str, Tensor]):
    """Activations of chosen modules during the most recent forward pass of ``model``; a context manager.

    Attach it for one block of code (``with``) or for as long as you like (:meth:`attach`, :meth:`close`). Each forward
    pass of ``model`` replaces what was held, and calls of its modules outside of one are not recorded, unless ``model``
    itself is never called. Leaving the block removes every hook and frees every tensor, also after an exception. The
    values are those of the forward pass: what gradient checkpointing recomputes during the backward pass is not
    recorded again. Copies of the model (``deepcopy``, pickle) are not tapped.

    With ``torch.compile`` the taps become part of the compiled graph (``fullgraph=True`` works) if they are attached
    before its first call: PyTorch's compiled code does not notice hooks that come later, nor that of several blocks
    compiled one by one only some have hooks inside, unless ``torch._dynamo.config.skip_nnmodule_hook_guards`` is False.
    A tap that is missed in this way says so when it is read. Gradients need a graph break each.

    Args:
        model: any module, wrapped or not; pass the object that is called in the training loop.
        patterns: names or patterns of modules, see :mod:`poise.core.names`.
        at: ``"output"`` of the modules or their ``"input"``.
        select: which tensor, where there are several. An index or key of the output (a tuple, dict or ModelOutput); for
            inputs the position or the keyword. Or a function of the output (of the dict of inputs by position and
            keyword) that returns a tensor; it may reduce, so that a large activation need not be held.
        detach: hold the tensors without their graph.
        clone: hold copies; needed where a later operation overwrites the tensor in place.
        gradients: also hold the gradient of each tensor after ``backward``; see :meth:`gradients`.

    Raises:
        ValueError: a pattern matches no module, or ``at`` is neither of the two.
        TypeError: ``model`` is a ``DataParallel``, which runs short-lived copies of the modules.
    """

    def __init__(
        self,
        model: nn.Module,
        *patterns: str,
        at: Literal["output", "input"] | str = "output",
        select: Select | None = None,
        detach: bool = False,
        clone: bool = False,
        gradients: bool = False,
    ) -> None:
        if isinstance(model, nn.DataParallel):
            raise TypeError("DataParallel runs copies of the modules; tap its .module or use DistributedDataParallel")
        if at not in ("output", "input"):
            raise ValueError(f"at must be 'output' or 'input', got {at!r}")
        self.modules = match_modules(model, *patterns)
        self._model = model
        self._at, self._select, self._detach, self._clone, self._gradients = at, select, detach, clone, gradients
        self._calls: dict[str, list[_Call]] = {name: [] for name in self.modules}
        self._received: dict[str, dict[int, Tensor]] = {name: {} for name in self.modules}
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._seen = False  # whether the model itself has been called
        self._depth = 0  # calls of the model that have not ended
        self._tracked = False  # whether the forward pass began with gradients on

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tapped modules, in the order of the patterns."""
        return tuple(self.modules)

    def attach(self) -> "Taps":
        """Start recording; nothing happens if it has started already."""
        if self._active:
            return self
        self._active = True
        self._handles.append(self._model.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True, prepend=True))
        self._handles.append(self._model.register_forward_hook(_Hook(self._end), with_kwargs=True, always_call=True))
        # gradients of tensors inside a compiled graph do not exist: break the graph there
        function = torch.compiler.disable(self._record) if self._gradients else self._record
        for name, module in self.modules.items():
            record = _Hook(function, name)
            self._handles.append(
                module.register_forward_hook(record, with_kwargs=True)
                if self._at == "output"
                else module.register_forward_pre_hook(record, with_kwargs=True)
            )
        return self

    def close(self) -> None:
        """Remove the hooks and free what is held."""
        self._active = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._depth = 0
        self.clear()

    def clear(self) -> None:
        """Free what is held and go on recording."""
        for name in self.modules:
            self._calls[name].clear()
            self._received[name] = {}  # a late backward pass writes into the old one

    def __enter__(self) -> "Taps":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a module that ran once.

        Raises:
            KeyError: no module of that name is tapped.
            RuntimeError: the module did not run or ran several times, or the tensor cannot be trusted: it was overwritten
                in place (``clone=True`` helps) or it has lost its graph (``detach=True`` accepts that).
        """
        calls = self.calls(name)
        if len(calls) != 1:
            raise RuntimeError(
                f"module {name!r} ran {len(calls)} times in one forward pass: read calls({name!r})"
                if calls
                else f"module {name!r} has not run since the tap was attached, cleared or the last forward pass began; "
                "if the model is compiled, attach before its first call or call torch.compiler.reset(), and if its blocks "
                "are compiled one by one set torch._dynamo.config.skip_nnmodule_hook_guards = False before that"
            )
        return calls[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def calls(self, name: str) -> tuple[Tensor, ...]:
        """The tensors of a module that may run any number of times in a forward pass, in order.

        Raises:
            KeyError, RuntimeError: as for ``taps[name]``, except for the number of calls.
        """
        for call in self._of(name):
            if call.version is not None and call.version != call.value._version:
                raise RuntimeError(f"the tensor of module {name!r} was overwritten in place: pass clone=True")
            if call.lost and not self._detach:
                raise RuntimeError(
                    f"module {name!r} ran without gradients inside a forward pass with gradients (torch.no_grad, or "
                    "checkpointing with use_reentrant=True): its tensor has no graph. Pass detach=True if it needs none"
                )
        return tuple(call.value for call in self._of(name))

    def gradients(self, name: str) -> tuple[Tensor | None, ...]:
        """The gradient of the differentiated scalar with respect to each tensor of ``calls(name)``.

        ``None`` for a tensor that the scalar did not depend on. A second backward pass replaces the first one's.

        Raises:
            KeyError: no module of that name is tapped.
            RuntimeError: the taps were made without ``gradients=True``.
        """
        if not self._gradients:
            raise RuntimeError("gradients are not recorded: make the taps with gradients=True")
        return tuple(self._received[name].get(number) for number in range(len(self._of(name))))

    def _of(self, name: str) -> "list[_Call]":
        if name not in self._calls:
            raise KeyError(f"no tap at {name!r}; there are {sorted(self._calls)}")
        return self._calls[name]

    def _begin(self, *_: Any) -> None:
        if not self._active or _recomputing():
            return
        if self._depth == 0:
            self.clear()
            self._seen = True
            self._tracked = torch.is_grad_enabled()
        self._depth += 1

    def _end(self, *_: Any) -> None:
        if self._active and not _recomputing():
            self._depth -= 1

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if not self._active:  # compiled code outlives the hooks that it was traced with
            return
        recomputing = _recomputing()
        if not recomputing and self._seen and not self._depth:
            return
        given = output if self._at == "output" else {**dict(enumerate(args)), **kwargs}
        tensor = _pick(given, self._select, f"{self._at} of module {name!r}")
        if recomputing:
            if self._gradients and tensor.requires_grad:
                self._watch_recomputed(name, tensor)
            return
        value = tensor.detach() if self._detach else tensor
        if self._clone:
            value = value.clone()
        # where the compiler orders the writes, versions mean nothing
        version = None if torch.compiler.is_compiling() or value.is_inference() else value._version
        self._calls[name].append(_Call(value, version, lost=self._tracked and not torch.is_grad_enabled()))
        if self._gradients and tensor.requires_grad:
            self._watch(name, len(self._calls[name]) - 1, tensor)

    def _watch_recomputed(self, name: str, tensor: Tensor) -> None:
        """Reentrant checkpointing: the graph of a module that ran without gradients is only built now."""
        without = [number for number, call in enumerate(self._calls[name]) if call.lost]
        if len(without) > 1:
            raise RuntimeError(
                f"module {name!r} ran {len(without)} times under reentrant checkpointing, so that its gradients cannot be "
                "told apart: use checkpointing with use_reentrant=False"
            )
        for number in without:
            self._watch(name, number, tensor)

    def _watch(self, name: str, number: int, tensor: Tensor) -> None:
        received = self._received[name]

        def receive(gradient: Tensor) -> None:
            received[number] = gradient.detach()

        tensor.register_hook(receive)


class _Call(NamedTuple):
    """What one call of a module left."""

    value: Tensor
    version: int | None
    lost: bool  # computed without a graph, although the forward pass as a whole has one


class _Hook:
    """A hook whose copies do nothing: a copy of a tapped model is not tapped."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self, *call: Any) -> None:
        self.function(*self.arguments, *call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _ignore

    def __reduce__(self) -> "tuple[Callable[[], Callable[..., None]], tuple[()]]":
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    pass


def _recomputing() -> bool:
    """Whether a backward pass is running, in which modules only run again for a checkpoint."""
    return not torch.compiler.is_compiling() and _AUTOGRAD.is_bw


def _pick(given: Any, select: Select | None, what: str) -> Tensor:
    if callable(select):
        chosen = select(given)
    elif select is not None:
        chosen = given[select]
    else:
        chosen = given
        if not isinstance(given, Tensor):
            values = given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else ()
            tensors = [value for value in values if isinstance(value, Tensor)]
            if len(tensors) != 1:
                raise TypeError(f"the {what} holds {len(tensors)} tensors ({_outline(given)}): say which with select")
            chosen = tensors[0]
    if not isinstance(chosen, Tensor):
        raise TypeError(f"select={select!r} took {_outline(chosen)} from the {what} ({_outline(given)}), not a tensor")
    return chosen


def _outline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_outline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_outline, value)) + ")"
    return type(value).__name__
