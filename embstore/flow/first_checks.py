"""What a command gives, checked before its store's folder is made: a refusal here leaves nothing behind.

Nothing here takes the store's lock or writes; the writer looks at the store again once it has the lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path

from embstore.core.config import BuildConfig, DatasetChoice, format_bytes
from embstore.core.errors import BudgetError, ConfigError
from embstore.core.events import Observer, stage
from embstore.core.file_kinds import LINES
from embstore.core.interfaces import EmbedderSource
from embstore.core.plan import plan
from embstore.core.records import JournalState
from embstore.flow.reuse import open_reused
from embstore.storage.hub_dataset import find_hub_dataset
from embstore.storage.journal import read_journal, run_entries
from embstore.storage.prompt_source import PromptSource, check_source
from embstore.storage.writer import read_spec, refuse_taken


def check_command(
    root: Path,
    prompts: PromptSource | None,
    config: BuildConfig,
    *,
    source: EmbedderSource | None,
    resume: bool,
    observer: Observer,
) -> EmbedderSource | None:
    """Place, prompts file, stores to reuse, model and device, in this order: the cheap ones first.

    Returns
    -------
    The source of rows: the one given, or that of the model; None where no row needs one.

    Raises
    ------
    EmbstoreError
        One of them cannot be used.
    """
    state = read_journal(root)
    refuse_taken(root, state, resume=resume)
    if prompts is not None:
        check_source(prompts)
        if state.prompts is None:
            _refuse_little_space(root, prompts, config)
    elif state.prompts is None:
        raise ConfigError("no prompts file was given", hint=f"give PROMPTS, the file to build {root} from")
    elif not resume:
        raise ConfigError(
            f"no prompts file was given, and {root} contains a store that was begun",
            hint="give PROMPTS to begin again, or add --resume to continue it",
        )
    if not resume:
        state = JournalState()  # what was begun there is begun again
    if state.spec is None:
        open_reused(config.reuse, root)
    source = source or find_source(root, state, config, observer)
    if source is not None and state.spec is None:
        source.device(config.embedding.device or "auto")
    return source


def on_hub(source: PromptSource | None, choice: DatasetChoice) -> PromptSource | None:
    """The dataset of the hub that the name of a source means, if it means one."""
    return (find_hub_dataset(source, choice) if isinstance(source, str | Path) else None) or source


def find_source(root: Path, state: JournalState, config: BuildConfig, observer: Observer) -> EmbedderSource | None:
    """The model named by the options or the last run; None if no model was named and every row is committed."""
    embedding = config.embedding
    if embedding.model is None and (config.reuse or state.reuse) and not models_of_runs(root, state):
        return None  # the old stores may contain every row
    if embedding.model is None:
        if state.spec is not None and not plan(read_spec(root, state), state).windows:
            return None
        if state.spec is not None and read_spec(root, state).embedding.head.kind == "imported":
            raise ConfigError(
                f"{root} is made from an array and has rows left to import",
                hint="run embstore import ARRAY --resume with the same --out",
            )
        model, revision = _model_of_last_run(root, state)
        embedding = dataclasses.replace(embedding, model=model, revision=revision)
    # torch loads only where rows may be computed, and says so, because it takes seconds
    with stage(observer, "imports") if "transformers" not in sys.modules else contextlib.nullcontext():
        from embstore.model.locate import locate_model  # noqa: PLC0415
        from embstore.model.source import TorchSource  # noqa: PLC0415
    with stage(observer, "fetch") if _may_download(str(embedding.model)) else contextlib.nullcontext():
        files = locate_model(embedding)
    return TorchSource(files, model_memory_bytes=config.model_memory_bytes)


def _may_download(model: str) -> bool:
    """Whether the name can be that of a model on the hub, which is downloaded where it is not in the cache."""
    return ":" not in model and not Path(model).expanduser().exists()


def _model_of_last_run(root: Path, state: JournalState) -> tuple[str, str | None]:
    models = models_of_runs(root, state)
    if not models:
        raise ConfigError("no model was given", hint="add --model, a folder or a hub id such as org/name")
    return models[-1]


def models_of_runs(root: Path, state: JournalState) -> list[tuple[str, str | None]]:
    """Models and revisions that the runs of this store named; earlier runs of a store that was begun again do not count."""
    entries = run_entries(root) if state.spec is not None or state.reuse is not None else []
    named = [(entry.get("model"), entry.get("revision")) for entry in entries]
    return [
        (model, revision)
        for model, revision in named
        if model and isinstance(model, str) and isinstance(revision, str | None)
    ]


def _refuse_little_space(root: Path, prompts: PromptSource, config: BuildConfig) -> None:
    """Refuse a disk that cannot even take the prompts; what the rows take is known when the model is."""
    if config.limit is not None or not isinstance(prompts, str | Path) or not Path(prompts).is_file():
        return
    if Path(prompts).suffix.lower() not in LINES:
        return  # a table may consist of pictures, which are left out
    needed_bytes, free_bytes = Path(prompts).stat().st_size, free_bytes_at(root)
    if needed_bytes > free_bytes:
        raise BudgetError(
            f"the prompts alone take {format_bytes(needed_bytes)}, "
            f"but the disk of {root} has {format_bytes(free_bytes)} free",
            hint="free some space, choose another --out, or try --limit",
        )


def free_bytes_at(root: Path) -> int:
    """Free space where ``root`` is, or will be."""
    return shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
