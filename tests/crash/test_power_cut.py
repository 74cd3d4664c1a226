"""A power cut between any two syncs, modelled: what was acknowledged is there, the rest is made again to the same bytes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.support.fake import FakeSource
from tests.support.faults import SystemCalls
from tests.support.power import IMAGES, Disk, Image
from tests.support.stores import Acknowledged, build_small, snapshot


class Cuts:
    """Builds a store and, before each sync, keeps what each kind of power cut would leave (equal images once)."""

    def __init__(self, prompts: Path, folder: Path, *, images: tuple[Image, ...] = IMAGES, deaf_to: str = "") -> None:
        self.images: dict[str, tuple[Path, set[tuple[int, int]]]] = {}
        self._folder, self._kinds = folder, images
        self._acknowledged = Acknowledged()
        store = folder / "store"
        store.mkdir()
        self._disk = Disk(root=store, deaf_to=deaf_to)
        with SystemCalls(root=store, disk=self._disk, before_sync=self._cut).watching():
            build_small(prompts, store, observer=self._acknowledged)
        self._cut()

    def _cut(self) -> None:
        for kind in self._kinds:
            target = self._folder / f"cut-{len(self.images)}"
            self._disk.write_image(target, kind)
            content = hashlib.sha256(repr(sorted(_tree(target).items())).encode()).hexdigest()
            if content in self.images:
                shutil.rmtree(target)
            # an image seen again is judged with what was acknowledged by then
            first = self.images.get(content, (target, None))[0]
            self.images[content] = (first, set(self._acknowledged.windows))


def _tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _violations(prompts: Path, cuts: Cuts, reference: dict[str, str]) -> list[str]:
    """Resume every image; what of promise 3 it breaks."""
    found = []
    for image, acknowledged in cuts.images.values():
        source = FakeSource()
        try:
            with SystemCalls(root=image).watching():
                build_small(prompts, image, source=source)
        except Exception as error:  # noqa: BLE001 - any refusal is a violation, whatever its kind
            found.append(f"{image.name}: {error!r}")
            continue
        if set(source.calls) & acknowledged:
            found.append(f"{image.name}: an acknowledged window was lost")
        if snapshot(image) != reference:
            found.append(f"{image.name}: other bytes")
    return found


def test_a_power_cut_at_any_sync_loses_nothing_acknowledged(
    small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    cuts = Cuts(small_prompts, tmp_path)
    assert len(cuts.images) > 60
    assert _violations(small_prompts, cuts, snapshot(finished_store)) == []


@pytest.mark.parametrize(
    ("deaf_to", "image"),
    [
        ("journal.jsonl", "synced"),
        ("coordinates.npy", "synced"),
        ("embeddings.zarr", "synced"),
        (".", "synced"),
        ("*.tmp", "names-first"),
    ],
    ids=["journal line", "coordinates", "folder of chunks", "folder of the store", "file before its rename"],
)
def test_the_model_notices_a_sync_that_is_left_out(
    small_prompts: Path, finished_store: Path, tmp_path: Path, deaf_to: str, image: Image
) -> None:
    cuts = Cuts(small_prompts, tmp_path, images=(image,), deaf_to=deaf_to)
    assert _violations(small_prompts, cuts, snapshot(finished_store))
