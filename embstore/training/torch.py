"""The samplers as ``torch.utils.data.Sampler``, for trainers that check ``isinstance``. Only this module imports torch."""

from __future__ import annotations

from torch.utils.data import Sampler

from embstore.training.group_repeat import GroupRepeat as _GroupRepeat
from embstore.training.sampler import DensitySampler as _DensitySampler


class DensitySampler(_DensitySampler, Sampler[int]):
    """``embstore.training.DensitySampler`` that is also a torch ``Sampler``."""


class GroupRepeat(_GroupRepeat, Sampler[int]):
    """``embstore.training.GroupRepeat`` that is also a torch ``Sampler``."""
