"""Checkpoints of nanochat through an installed ``nanochat``: for models that transformers' NanoChat class cannot represent.

nanochat has no releases, so a checkpoint belongs to the commit that trained it: later commits changed not only tensors and
settings but constants in the code (the rotary base, a factor on queries and keys, the soft cap). Therefore nothing is
patched: settings and tensors must be exactly those of the package found, and the digest of the package's modules is part of
the store's identity. Written from github.com/karpathy/nanochat 92d63d4 (2026-07-03) and the history of its ``gpt.py`` since
2025-10-13; the commits of 2026-01-11 to 16 import flash-attention 3 unconditionally and cannot be used.

How the package is made to fit:

- It is imported apart, once a model: its modules leave ``sys.modules`` again, so each model has its own ``COMPUTE_DTYPE`` (a
  global that its ``forward`` asserts and casts to), whatever another model, or the program around us, has set.
- It is built on the meta device, emptied onto the CPU and initialised by its own ``init_weights``, as its own loader does:
  that fills the rotary tables, which are in no checkpoint. Then every tensor is replaced by the checkpoint's, in float32.
- The hidden states are what reaches ``lm_head``, whatever is done before it (norms, a mid-layer residual taken out).
- ``forward`` knows no mask. It is causal, so padding on the right never reaches a real token.

Shapes: B rows, T tokens, L hidden states in a flat list, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from embstore.core.errors import ModelError
from embstore.model.digests import files_sha256

_PACKAGE = "nanochat"
_DTYPE_VARIABLE = "NANOCHAT_DTYPE"
_SATURATING = (1e6, 2e6)
_TWO_TOKENS = torch.zeros((1, 2), dtype=torch.long)  # the fewest that the package takes
_HINT = "put the nanochat that trained it on PYTHONPATH, at the same commit"


@dataclass(frozen=True, kw_only=True, slots=True)
class NanochatPackage:
    """An installed ``nanochat``, not imported yet."""

    folder: Path

    def sha256(self) -> str:
        """Digest of the package's modules: the code is what decides the logits, as much as the settings."""
        return files_sha256(self.folder.glob("*.py"))

    def build(self, settings: Mapping[str, Any], state: Mapping[str, Tensor], *, name: str) -> NanochatModel:
        """The package's GPT with these weights, in float32 on the CPU.

        Raises
        ------
        ModelError
            The package cannot be imported or run, or has other settings or tensors than the checkpoint.
        """
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it pads
                code = _imported_apart()
                self._refuse_others(
                    name, "setting", set(settings), {each.name for each in dataclasses.fields(code.GPTConfig)}
                )
                with torch.device("meta"):
                    gpt = code.GPT(code.GPTConfig(**settings))
                self._refuse_others(name, "tensor", set(state), set(gpt.state_dict()))
                gpt.to_empty(device="cpu")
                with torch.random.fork_rng(devices=[]):  # whoever runs us keeps their random numbers
                    gpt.init_weights()
                weights = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
                gpt.load_state_dict(weights, strict=True, assign=True)
                return NanochatModel(gpt.eval(), code, settings)
        except ModelError:
            raise
        except Exception as error:  # the package's own code runs here
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"{name} cannot be built with the nanochat in {self.folder}: {message[:250]}",
                hint=_HINT,
            ) from error

    def _refuse_others(self, name: str, what: str, given: set[str], known: set[str]) -> None:
        """A field left out would take the package's default: that of the day it was checked out, not of the training."""
        for names, problem in ((given - known, "does not know"), (known - given, "has, but the checkpoint lacks")):
            if names:
                raise ModelError(
                    f"{name} does not match the nanochat in {self.folder}: {what} {min(names)}, which the "
                    f"package {problem} ({len(names)} in total)",
                    hint=_HINT,
                )


def find_package() -> NanochatPackage | None:
    """The ``nanochat`` that ``import nanochat`` would take; nothing of it runs."""
    try:
        spec = importlib.util.find_spec(_PACKAGE)
    except ValueError:  # sys.modules has something else than a package under that name
        spec = None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    # any folder named nanochat counts as a package, a folder of checkpoints too
    return next((NanochatPackage(folder=folder) for folder in folders if (folder / "gpt.py").is_file()), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class NanochatConfig:
    """What of a transformers configuration is asked for; ``final_logit_softcapping`` is measured, None for no cap."""

    hidden_size: int
    max_position_embeddings: int
    final_logit_softcapping: float | None

    def get_text_config(self) -> Self:
        """Itself: all of it is about text."""
        return self

    def to_dict(self) -> dict[str, object]:
        """Every field by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Output of a backbone. ``tokens_BT`` is None if the caller replaced the hidden states."""

    last_hidden_state: Tensor
    tokens_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Logits:
    """What a model gives: ``logits`` [B, T, V]."""

    logits: Tensor


class NanochatBackbone(nn.Module):
    """Everything before ``lm_head``."""

    runs_whole = True  # its head is reached through its layers, so they must all be in memory

    def __init__(self, gpt: nn.Module, code: Any, config: NanochatConfig) -> None:  # noqa: ANN401 - a module
        super().__init__()
        self.trunk: Any = _with_output_layer(gpt, _Stop())
        self.config = config
        self._code = code
        self._table_dtypes = {name: table.dtype for name, table in self.trunk.named_buffers(recurse=False)}

    @property
    def base_model(self) -> NanochatBackbone:
        """Itself: for hidden states it is the whole model."""
        return self

    def get_input_embeddings(self) -> Any:  # noqa: ANN401 - nn.Embedding, of an untyped package
        """The token table; it may have more rows than the vocabulary."""
        return self.trunk.transformer.wte

    def compute_in(self, dtype: torch.dtype) -> None:
        """Tell the package, once its weights are in ``dtype``; tables that it fixes in bfloat16 stay as they are."""
        if hasattr(self._code, "COMPUTE_DTYPE"):
            self._code.COMPUTE_DTYPE = dtype
        else:
            for name, table_dtype in self._table_dtypes.items():
                setattr(self.trunk, name, getattr(self.trunk, name).to(table_dtype))

    def forward(self, input_ids: Tensor, **_: object) -> States:
        """Hidden states [B, T, D] as ``lm_head`` receives them."""
        try:
            self.trunk(_two_at_least(input_ids))
        except _Reached as reached:
            return States(last_hidden_state=reached.hidden_BTD[:, : input_ids.shape[1]], tokens_BT=input_ids)
        raise ModelError("the forward pass of the installed nanochat does not end in lm_head", hint=_HINT)


class NanochatModel(nn.Module):
    """nanochat's GPT with what transformers' classes offer, as far as ``SplitModel`` asks for it."""

    def __init__(self, gpt: Any, code: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401 - of an untyped package
        super().__init__()
        self.gpt = gpt
        _drop_padding(gpt, settings["vocab_size"])
        self.config = NanochatConfig(
            hidden_size=gpt.lm_head.weight.shape[1],
            max_position_embeddings=settings["sequence_len"],
            final_logit_softcapping=_soft_cap(gpt),
        )
        self.base_model = NanochatBackbone(gpt, code, self.config)
        with torch.inference_mode():
            self.base_model(_TWO_TOKENS)  # what cannot be used is refused here, not in the middle of a build

    def get_input_embeddings(self) -> Any:  # noqa: ANN401 - nn.Embedding, of an untyped package
        """The token table; it may have more rows than the vocabulary."""
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:  # noqa: ANN401 - nn.Linear, of an untyped package
        """The output layer, without the rows that only pad it."""
        return self.gpt.lm_head

    def forward(self, input_ids: Tensor, **_: object) -> Logits:
        """Logits [B, T, V] by the package's unmodified code, or by its code after ``lm_head`` of hidden states put in."""
        states: States = self.base_model(input_ids=input_ids)
        if states.tokens_BT is None:
            return Logits(logits=_logits_of(self.gpt, states.last_hidden_state))
        return Logits(logits=self.gpt(_two_at_least(states.tokens_BT))[:, : input_ids.shape[1]])


class _Reached(Exception):
    """No error: it carries the result out of a forward pass that ends early."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


class _Stop(nn.Module):
    """In the place of ``lm_head``: ends the forward pass with what it is given."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        raise _Reached(hidden_BTD)


class _Instead(nn.Module):
    """In the place of ``lm_head``: its logits of other hidden states than it is given."""

    def __init__(self, lm_head: nn.Module, hidden_BTD: Tensor) -> None:
        super().__init__()
        self._lm_head, self._hidden_BTD = lm_head, hidden_BTD

    def forward(self, _: Tensor) -> Tensor:
        logits_BTV: Tensor = self._lm_head(self._hidden_BTD)
        return logits_BTV


def _with_output_layer(gpt: nn.Module, layer: nn.Module) -> nn.Module:
    """The same model with another ``lm_head``. All else is shared, and no hook or flag is set that threads could mix up."""
    twin = copy.copy(gpt)
    twin._modules = {**gpt._modules, "lm_head": layer}
    return twin


def _logits_of(gpt: Any, hidden_BTD: Tensor) -> Tensor:  # noqa: ANN401
    """Logits [B, T, V] of hidden states: two tokens are run only to come to the code after ``lm_head``."""
    twin = _with_output_layer(gpt, _Instead(gpt.lm_head, hidden_BTD))
    logits_BTV: Tensor = twin(_TWO_TOKENS.to(hidden_BTD.device))
    return logits_BTV


def _two_at_least(tokens_BT: Tensor) -> Tensor:
    """The package refuses a single token; one more on the right reaches no other."""
    return nn.functional.pad(tokens_BT, (0, 1)) if tokens_BT.shape[1] < 2 else tokens_BT


@torch.inference_mode()
def _drop_padding(gpt: Any, num_columns: int) -> None:  # noqa: ANN401
    """Cut rows off ``lm_head`` whose logits the package cuts off: it pads the vocabulary to a multiple of 64."""
    weight_VD = gpt.lm_head.weight
    found = gpt(_TWO_TOKENS).shape[-1]
    if found == num_columns < len(weight_VD):
        with torch.inference_mode(mode=False):  # or the weight could never be changed again
            gpt.lm_head.weight = nn.Parameter(weight_VD.detach()[:num_columns].clone(), requires_grad=False)
            gpt.lm_head.out_features = num_columns


@torch.inference_mode()
def _soft_cap(gpt: Any) -> float | None:  # noqa: ANN401
    """Where the logits of ever louder hidden states end: 15 as a rule, 20 for a week in March 2026."""
    ones_11D = torch.ones((1, 1, gpt.lm_head.weight.shape[1]))
    first, second = (float(_logits_of(gpt, loudness * ones_11D).abs().max()) for loudness in _SATURATING)
    return first if first == second and math.isfinite(first) and first > 0 else None


def _imported_apart() -> Any:  # noqa: ANN401
    """A private copy of ``nanochat.gpt``, set to float32; the process is left unchanged.

    flash-attention 3 is hidden from it: the package would download and load a kernel that float32 cannot use.
    """
    before = _taken_modules()
    kernels = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level  # it configures the root logger
    sys.modules["kernels"] = None  # type: ignore[assignment]  # which makes its import an ImportError
    try:
        with _environment(_DTYPE_VARIABLE, "float32"):
            return importlib.import_module(f"{_PACKAGE}.gpt")
    finally:
        del sys.modules["kernels"]
        sys.modules.update(kernels)
        _taken_modules()
        sys.modules.update(before)
        root.handlers[:] = handlers
        root.setLevel(level)


def _taken_modules() -> dict[str, Any]:
    """The package's modules, taken out of ``sys.modules``."""
    names = [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
