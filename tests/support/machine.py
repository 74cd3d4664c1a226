"""A machine with a modelled disk: writers run on it one after another, are killed, and lose their power.

``Machine`` keeps what was promised so far and holds the disk against it: every acknowledged window is committed and right,
no acknowledged window is computed again, the artefact is the old one or the new one, and no wrong byte is served. Whatever
was not acknowledged may be there or not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from embstore.core.config import WeightingConfig
from embstore.core.errors import CorruptStoreError, EmbstoreError, IncompleteStoreError, StorageError, StoreNotFoundError
from embstore.core.events import Event, RowsCommitted, StageStarted
from embstore.core.format import METADATA_LINK, WEIGHTS_LINK
from embstore.core.records import JournalState
from embstore.flow.artifact import recompute_weights
from embstore.storage.journal import read_journal
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from tests.support.faults import Call, Killed, SystemCalls
from tests.support.power import Disk, Survival, Tree, lay
from tests.support.stores import NUM_CHUNKS, WINDOWS, build_small, snapshot, with_density

STORE = "new/folders/store"  # below the disk's root; every folder on the way is made by the first writer
CONFIGS = {"first": CONFIG, "second": with_density(seed=7)}
STEEP = WeightingConfig(gamma=3)

Variant = tuple[str, str]
"""An artefact: which search settings, and which weighting."""


class Lost(AssertionError):
    """A promise is broken."""


def without_replaced(store: Path) -> tuple[bytes, dict[str, str]]:
    """The manifest as it would be had no weights been replaced, and the snapshot of such a store.

    Which weights stay from before depends on a store's history; ``Machine`` holds them against what was promised.
    """
    manifest = json.loads((store / "manifest.json").read_bytes())
    replaced = {digest for name, digest in manifest["names"].items() if "@" in name}
    manifest["names"] = {name: digest for name, digest in manifest["names"].items() if "@" not in name}
    gone = {f"weights/{digest}{end}" for digest in replaced - {*manifest["names"].values()} for end in (".npy", ".json")}
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if name not in gone}
    content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    found = {name: digest for name, digest in snapshot(store).items() if name not in gone}
    return content, found | {"manifest.json": hashlib.sha256(content).hexdigest()}


class Oracle:
    """Every variant, built without a fault."""

    def __init__(self, prompts: Path, folder: Path) -> None:
        self.prompts = prompts
        self.snapshots: dict[Variant, dict[str, str]] = {}
        self.manifests: dict[bytes, Variant] = {}
        self.weights: dict[Variant, bytes] = {}
        self.digests: dict[Variant, str] = {}
        for density, config in CONFIGS.items():
            store = folder / density
            build_small(prompts, store, config=config)
            self._keep((density, "plain"), store)
            recompute_weights(store, STEEP)
            self._keep((density, "steep"), store)
            whole = open_store(store)
            self.chunks = [whole.read_chunk(index).tobytes() for index in range(NUM_CHUNKS)]
            self.coordinates, self.residuals = np.array(whole.coordinates), np.array(whole.residuals)
            self.sequences = np.array(whole.sequences)

    def _keep(self, variant: Variant, store: Path) -> None:
        content, self.snapshots[variant] = without_replaced(store)
        self.manifests[content] = variant
        weights = load_weights(store)
        self.weights[variant], self.digests[variant] = weights.array.tobytes(), str(weights.weighting)


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What must be found: windows, and one of the artefacts (None: an unfinished store).

    ``rotten``: files that were damaged and are not made again yet; ``is_repaired``: a repair took note of them.
    ``done``: the last artefact whose writer came to its end; ``kept``: those that it replaced, whose weights stay.
    """

    acknowledged: frozenset[tuple[int, int]] = frozenset()
    allowed: frozenset[Variant | None] = frozenset({None})
    rotten: frozenset[str] = frozenset()
    is_repaired: bool = False
    done: Variant | None = None
    kept: frozenset[Variant] = frozenset()


FINISHED = Promise(acknowledged=frozenset(WINDOWS), allowed=frozenset({("first", "plain")}), done=("first", "plain"))


def _windows(state: JournalState) -> frozenset[tuple[int, int]]:
    return frozenset((window.start, window.stop) for window in state.windows.values())


class Machine:
    """Runs writers on the disk at ``root``; ``calls`` are those of the last one."""

    def __init__(self, root: Path, oracle: Oracle, *, tree: Tree | None = None, promise: Promise | None = None) -> None:
        self.root = root
        self.store = root / STORE
        self.oracle = oracle
        self.promise = promise or Promise()
        self.calls: list[Call] = []
        lay(tree or {}, root)
        self.disk = Disk(root)

    def build(self, density: str = "first", *, second_writer: bool = False, **faults: object) -> bool:
        """Build or resume; True if it came to its end."""
        source = FakeSource()
        before = self.promise.acknowledged

        def work(calls: list[Call]) -> None:
            def tell(event: Event) -> None:
                if isinstance(event, RowsCommitted):
                    calls.append(Call("acknowledged", f"{event.start} {event.stop}"))
                    self._promise(acknowledged=self.promise.acknowledged | {(event.start, event.stop)})
                elif isinstance(event, StageStarted) and event.stage == "embed":
                    self._promise(acknowledged=self.promise.acknowledged | _windows(self._state()))  # "[resumed n/N]"
                elif isinstance(event, StageStarted) and event.stage == "publish" and second_writer:
                    self._second_writer_is_refused()

            given = None if self._state().prompts is not None else self.oracle.prompts
            build_small(given, self.store, config=CONFIGS[density], source=source, observer=tell)

        result: Variant = (density, "plain")
        try:
            is_done = self._process(work, result, faults)
        finally:
            again = set(source.calls) & before
            if again:
                raise Lost(f"acknowledged windows were computed again: {sorted(again)}")
        if is_done:  # of damaged stores only repaired ones are built
            self._promise(acknowledged=frozenset(WINDOWS), rotten=frozenset())
        return is_done

    def recompute(self, **faults: object) -> bool:
        """New weights for a published store."""
        current = self.current
        assert current is not None
        return self._process(lambda calls: recompute_weights(self.store, STEEP), (current[0], "steep"), faults)

    def repair(self, **faults: object) -> bool:
        """``verify --repair``: unpublishes what is damaged, and leaves a sound store as it is."""
        result = None if self.promise.rotten and not self.promise.is_repaired else self.current
        is_done = self._process(lambda calls: verify(self.store, repair=True), result, faults)
        self._promise(is_repaired=self.promise.is_repaired or is_done)
        return is_done

    def rot(self, name: str, offset: int) -> None:
        """A byte of a file goes bad on the disk; its window is promised no more."""
        path = self.store / name
        content = bytearray(path.read_bytes())
        content[offset] ^= 0xFF
        path.write_bytes(content)
        self.disk.look()
        self.disk.synced(str(path), self.disk.find(str(path)))
        self._promise(rotten=self.promise.rotten | {name}, is_repaired=False)

    def forget_window(self, window: int) -> None:
        """What it promised is void: it was damaged."""
        self._promise(acknowledged=self.promise.acknowledged - {WINDOWS[window]})

    def cut(self, survival: Survival) -> None:
        """Cut the power and start again."""
        self.disk.cut(survival)

    @property
    def is_begun(self) -> bool:
        """Whether there is a store that commands other than build accept."""
        return self._state().prompts is not None

    @property
    def current(self) -> Variant | None:
        """The artefact that a reader finds."""
        if not (self.store / "manifest.json").exists():
            return None
        try:
            return self.oracle.manifests[without_replaced(self.store)[0]]
        except (ValueError, LookupError):  # not JSON, or other fields or values
            raise Lost("a manifest that nobody wrote") from None

    def check(self) -> None:
        """Hold what lies on the disk now against the promise, through the package's own readers; writes nothing."""
        current = self.current
        if current not in self.promise.allowed:
            raise Lost(f"the artefact is {current}, it should be one of {self.promise.allowed}")
        state = self._state()
        if self.promise.acknowledged - _windows(state):
            raise Lost(f"committed is {sorted(_windows(state))}, promised {sorted(self.promise.acknowledged)}")
        if state.prompts is None:
            return
        calls: list[Call] = []
        with SystemCalls(root=self.root, calls=calls).watching(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", lambda seconds: None)  # no writer is alive that a reader could wait for
            try:
                self._check_findings()
                self._check_rows(open_store(self.store, partial=True))
            except StoreNotFoundError:
                if self.promise.acknowledged:
                    raise Lost("the store is gone") from None
            except EmbstoreError as error:
                if not self.promise.rotten:
                    raise Lost(f"what is there cannot be read: {error!r}") from error
            if current is not None and load_weights(self.store).array.tobytes() != self.oracle.weights[current]:
                raise Lost("the weights are not those of the manifest")
            if current is not None:
                self._check_replaced(current)
        if calls:
            raise Lost(f"a reader wrote: {calls}")

    def finish(self) -> None:
        """The next resume comes to the bytes of a build without faults."""
        if self.promise.rotten:
            self.repair()
        if not self.build():
            raise Lost("a resume did not finish")
        self._check_replaced(("first", "plain"))
        found, expected = without_replaced(self.store)[1], self.oracle.snapshots["first", "plain"]
        if found != expected:
            unlike = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise Lost(f"other bytes in {unlike}")
        if _windows(self._state()) != self.promise.acknowledged:
            raise Lost("the journal does not say what was committed")

    def _promise(self, **changes: object) -> None:
        self.promise = dataclasses.replace(self.promise, **changes)  # type: ignore[arg-type]

    def _state(self) -> JournalState:
        return read_journal(self.store)

    def _process(self, work: Callable[[list[Call]], object], result: Variant | None, faults: dict[str, object]) -> bool:
        """One writer, to its end, its death or its error; from its first call on, both the old and the new may be found."""
        between: set[Variant | None] = {result, *({None} if self.promise.rotten else ())}
        self._promise(allowed=self.promise.allowed | between)
        with SystemCalls(root=self.root, disk=self.disk, **faults).watching() as calls:  # type: ignore[arg-type]
            self.calls = calls.calls
            try:
                work(calls.calls)
            except Killed:
                return False
            except StorageError as error:
                if error.errno is None or error.errno != faults.get("error"):
                    raise Lost(f"a writer was refused: {error!r}") from error
                return False
            except Exception as error:
                raise Lost(f"a writer was refused: {error!r}") from error
        done = self.promise.done
        if result is not None and done is not None and result != done:
            self._promise(kept=self.promise.kept | {done})
        self._promise(allowed=frozenset({result}), done=result or done)
        return True

    def _second_writer_is_refused(self) -> None:
        before = snapshot(self.store)
        try:
            build_small(self.oracle.prompts, self.store)
        except EmbstoreError as error:
            if error.kind != "locked" or snapshot(self.store) != before:
                raise Lost(f"a second writer was told {error!r}") from error
            return
        raise Lost("a second writer was let in")

    def _check_replaced(self, current: Variant) -> None:
        """Weights that a finished writer published are there to this day, and what else is named is of some writer."""
        done = self.promise.done
        promised = self.promise.kept | ({done} if done is not None and done != current else set())
        names = set(json.loads((self.store / "manifest.json").read_bytes())["names"]) - {"default"}
        if names - {f"default@{digest}" for digest in self.oracle.digests.values()}:
            raise Lost(f"weights that nobody made: {names}")
        for variant in promised:
            name = f"default@{self.oracle.digests[variant]}"
            if name not in names:
                raise Lost(f"the weights {variant} were replaced, and are gone")
        for name in names:
            variant = next(each for each, digest in self.oracle.digests.items() if name.endswith(digest))
            if load_weights(self.store, name=name).array.tobytes() != self.oracle.weights[variant]:
                raise Lost(f"the replaced weights {variant} have other values")

    def _check_findings(self) -> None:
        findings = verify(self.store).findings
        if len(self.promise.allowed) > 1:  # the links follow the manifest: between them, the next writer mends
            findings = [finding for finding in findings if finding.path not in (WEIGHTS_LINK, METADATA_LINK)]
        if findings and not self.promise.rotten:
            raise Lost(f"verify finds {findings}")

    def _check_rows(self, store: EmbeddingStore) -> None:
        for rows in store.committed_rows:
            for name in ("coordinates", "residuals", "sequences"):
                served, expected = getattr(store, name), getattr(self.oracle, name)
                is_right = np.array_equal(served[rows.start : rows.stop], expected[rows.start : rows.stop])
                if not is_right and f"{name}.npy" not in self.promise.rotten:
                    raise Lost(f"wrong {name} in rows {rows}")
        for index, expected in enumerate(self.oracle.chunks):
            try:
                if store.read_chunk(index).tobytes() != expected:
                    raise Lost(f"wrong rows in chunk {index}")
            except IncompleteStoreError:
                if any(start <= index * 16 < stop for start, stop in self.promise.acknowledged):
                    raise Lost(f"chunk {index} is gone") from None
            except CorruptStoreError as error:
                if not self.promise.rotten:
                    raise Lost(f"chunk {index}: {error}") from error
