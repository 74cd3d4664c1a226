"""Two-dimensional layouts of the prompts: principal components of the coordinates, and UMAP where its extra is installed.

Shapes: M prompts shown, R coordinates.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError
from embstore.core.format import COORDINATES, LARGEST_COORDINATE
from embstore.core.rows import slices

_BLOCK_ROWS = 4096
_UMAP_COMPONENTS = 50  # UMAP's own neighbour search is slow and no better in more dimensions than carry the variance


@dataclass(frozen=True, kw_only=True, slots=True)
class PrincipalAxes:
    """``axes`` float64 [R, A], orthonormal, largest variance first; ``share`` is the part of the variance they carry."""

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    share: float


def principal_axes(coordinates_NR: NDArray[np.float32], rows: NDArray[np.int64], count: int) -> PrincipalAxes:
    """Axes of largest variance of the given rows: exact, in float64, one block of rows in memory at a time.

    Parameters
    ----------
    coordinates_NR
        float32 [N, R], of unit rows.
    rows
        int64 [M], at least one.
    count
        How many axes; fewer come back when R is smaller.

    Raises
    ------
    CorruptStoreError
        A coordinate is larger than a unit row allows: 3e38 leaves sums finite and makes UMAP return NaN.
    """
    rank = coordinates_NR.shape[1]
    total_R = np.zeros(rank)
    for block_BR in _blocks(coordinates_NR, rows):
        if not (np.abs(block_BR) <= LARGEST_COORDINATE).all():
            raise CorruptStoreError(
                f"{COORDINATES} has coordinates that are not finite or exceed {LARGEST_COORDINATE:g}",
                hint="run embstore verify STORE",
            )
        total_R += block_BR.sum(axis=0)
    mean_R = total_R / len(rows)
    scatter_RR = np.zeros((rank, rank))
    for block_BR in _blocks(coordinates_NR, rows):
        centred_BR = block_BR - mean_R
        scatter_RR += centred_BR.T @ centred_BR
    values, vectors_RR = np.linalg.eigh(scatter_RR)
    axes_RA = vectors_RR[:, ::-1][:, :count]
    # the sign of an axis is arbitrary: the largest entry is made positive, so that equal stores give equal maps
    largest = np.abs(axes_RA).argmax(axis=0)
    axes_RA = axes_RA * np.where(axes_RA[largest, np.arange(axes_RA.shape[1])] < 0, -1.0, 1.0)
    total = float(values.sum())
    share = float(values[::-1][:count].sum() / total) if total > 0 else 1.0
    return PrincipalAxes(mean=mean_R, axes=axes_RA, share=min(1.0, share))


def project(coordinates_NR: NDArray[np.float32], rows: NDArray[np.int64], axes: PrincipalAxes) -> NDArray[np.float64]:
    """The rows along the axes, float64 [M, A]."""
    return np.concatenate([(block_BR - axes.mean) @ axes.axes for block_BR in _blocks(coordinates_NR, rows)])


def plane(points_MA: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first two columns, [M, 2]; zeros where there are fewer."""
    plane_M2 = np.zeros((len(points_MA), 2))
    plane_M2[:, : min(2, points_MA.shape[1])] = points_MA[:, :2]
    return plane_M2


def has_umap() -> bool:
    """Whether the ``umap`` extra is installed."""
    try:
        importlib.metadata.version("umap-learn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def umap_plane(coordinates_NR: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """A UMAP layout (McInnes et al. 2018, arXiv:1802.03426), [M, 2]; None without its extra or with under 20 rows.

    Made from the first 50 principal components with a fixed seed, which costs UMAP its threads and makes equal stores give
    equal maps.
    """
    if not has_umap() or len(rows) < 20:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a seed turns threads off, which UMAP warns of; numba warns of much else
        import umap  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415 - an extra that takes seconds to load

        axes = principal_axes(coordinates_NR, rows, _UMAP_COMPONENTS)
        points_MA = project(coordinates_NR, rows, axes).astype(np.float32)
        found = umap.UMAP(n_neighbors=15, min_dist=0.05, random_state=0, n_jobs=1).fit_transform(points_MA)
    return np.asarray(found, dtype=np.float64)


def _blocks(coordinates_NR: NDArray[np.float32], rows: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    for block in slices(0, len(rows), _BLOCK_ROWS):
        yield coordinates_NR[rows[block]].astype(np.float64)
