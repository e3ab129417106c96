"""Gradient rules around any PyTorch optimizer: the rule sees the gradients after unscaling and clipping, right before the step.

>>> import torch
>>> class SignedGradients(OptimizerWrapper):
...     def transform_gradients(self) -> None:
...         for weight in self.weights_with_gradient():
...             weight.grad.sign_()
>>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
>>> optimizer = SignedGradients(torch.optim.SGD([weight], lr=0.5))
>>> weight.grad = torch.tensor([0.1, -3.0])
>>> optimizer.step()
>>> weight.tolist()
[0.5, -1.5]
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class OptimizerWrapper(Optimizer):
    """An optimizer that changes the gradients and leaves the step, and all state, to another optimizer.

    A subclass writes :meth:`transform_gradients`. The parameter groups *are* those of the wrapped optimizer, also after it
    has loaded a state: learning rate schedulers, ``GradScaler`` and gradient clipping work on the wrapper as on the
    optimizer itself. With a closure the gradients of every evaluation are transformed.

    Args:
        optimizer: the optimizer to wrap, or its class.
        params: with a class, the parameters or parameter groups to make it for.
        settings: with a class, its further arguments, ``{"lr": 0.01}``.

    Attributes:
        optimizer: the wrapped optimizer.

    Raises:
        TypeError: ``optimizer`` is neither an optimizer nor a class of them, or ``params`` and ``settings`` do not go
            with it.
    """

    optimizer: Optimizer

    def __init__(
        self,
        optimizer: Optimizer | type[Optimizer],
        params: Parameters | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        # Optimizer.__init__ would make parameter groups and a state of its own; __setstate__ makes the rest of an optimizer.
        super().__setstate__({"optimizer": _made(optimizer, params, settings)})

    def transform_gradients(self) -> None:
        """Change the ``grad`` of the parameters in place; called without autograd before every step of the optimizer."""
        raise NotImplementedError(f"{type(self).__name__} must define transform_gradients()")

    def weights_with_gradient(self) -> list[Tensor]:
        """The parameters of all groups that hold a gradient."""
        return [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Transform the gradients and step.

        Args:
            closure: evaluates the model anew and returns the loss.
        """
        if closure is None:
            self._transform()
            return self.optimizer.step()

        def evaluated() -> Any:
            loss = closure()
            self._transform()
            return loss

        return self.optimizer.step(evaluated)

    @torch.no_grad()
    def _transform(self) -> None:
        self.transform_gradients()

    # What schedulers, scalers and users read is the wrapped optimizer's, always: loading a state replaces these objects.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        # Copies leave behind what belongs to this object alone: hooks, and the step that a scheduler put in front.
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "step"}


def _made(
    optimizer: Optimizer | type[Optimizer], params: Parameters | None, settings: Mapping[str, Any] | None
) -> Optimizer:
    if isinstance(optimizer, Optimizer):
        if params is not None or settings is not None:
            raise TypeError("params and settings go with the class of an optimizer, but got an optimizer that has them")
        return optimizer
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"optimizer must be an optimizer or a class of optimizers, got {optimizer!r}")
    if params is None:
        raise TypeError(f"{optimizer.__name__} is a class: give the parameters to make it for")
    make = cast(Callable[..., Optimizer], optimizer)
    return make(params, **(settings or {}))
