r"""SORSA for models of Hugging Face peft: ``get_peft_model``, ``merge_and_unload``, ``save_pretrained`` and several adapters work.

>>> import tempfile
>>> from peft import PeftModel, get_peft_model
>>> from torch import nn
>>> from poise.core import SorsaRegularizer
>>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
>>> model = get_peft_model(base, sorsa_lora_config(r=2, target_modules=["0"]))
>>> regularizer = SorsaRegularizer(model, gamma=4e-4, lr=3e-3)
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)
34
>>> folder = tempfile.mkdtemp()
>>> model.save_pretrained(folder)
>>> base = model.merge_and_unload()
>>> again = PeftModel.from_pretrained(base, folder, config=read_sorsa_lora_config(folder))
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from poise.core.adapters.lora import check_scale

if TYPE_CHECKING:
    from peft import LoraConfig


def sorsa_lora_config(
    r: int, target_modules: Any, alpha: float | None = None, dropout: float = 0.0, *, task_type: str | None = None
) -> "LoraConfig":
    """A configuration for ``peft.get_peft_model`` that puts SORSA layers in the place of Linear and ``Conv1D`` layers.

    Args:
        r: rank.
        target_modules: as peft takes them.
        alpha: for a scale of alpha / r; 1 by default.
        dropout: of the adapter's input.
        task_type: as peft takes it.

    Raises:
        ValueError: r or alpha is not positive.
        ModuleNotFoundError: peft is not installed.

    Source:
        the layers are registered by peft's interface for layers of one's own.
    """
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    check_scale(alpha, r)
    config = _peft().LoraConfig(
        r=r,
        lora_alpha=r if alpha is None else alpha,
        target_modules=target_modules,
        lora_dropout=dropout,
        init_lora_weights=False,  # the layers do it
        task_type=task_type,
    )
    return _registered(config)


def read_sorsa_lora_config(folder: Path | str) -> "LoraConfig":
    """The configuration of a saved model, for ``PeftModel.from_pretrained(base, folder, config=...)``.

    Args:
        folder: where ``save_pretrained`` wrote it. peft splits the weights of ``base`` again, then loads the trained triplets.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    return _registered(_peft().LoraConfig.from_pretrained(str(folder)))


def _registered(config: Any) -> Any:
    from transformers.pytorch_utils import Conv1D  # peft needs it too

    from poise.core.adapters.sorsa_peft_layer import SorsaLoraLinear

    config._register_custom_module({nn.Linear: SorsaLoraLinear, Conv1D: SorsaLoraLinear})
    return config


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("SORSA for peft needs peft: pip install peft") from error
    return peft
