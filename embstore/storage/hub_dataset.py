"""Datasets of the Hugging Face hub, streamed by the ``datasets`` library; without a network, the copy in the hub's cache.

A dataset is read at one commit, which the store records. No code of a dataset runs: ``datasets`` 4 and later has no way to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.core.arrow_values import kept_columns
from embstore.core.config import DatasetChoice, PromptFields
from embstore.core.decode import words_of
from embstore.core.errors import PromptError
from embstore.core.prompts import prompt_fields
from embstore.core.records import OriginRecord
from embstore.storage.prompt_folder import choose, is_data_file

_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_INSTALL = "pip install 'embstore[datasets]'"
_LEAST_VERSION = 4
_NOT_THERE = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "HFValidationError", "DisabledRepoError")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubDataset:
    """A dataset at one commit. ``folder`` is its copy in the hub's cache, where the hub itself cannot be reached."""

    origin: OriginRecord
    folder: Path | None = None

    @property
    def name(self) -> str:
        """Its id and commit, for messages."""
        return f"{self.origin.dataset}@{self.origin.revision[:12]}"


def find_hub_dataset(source: str | Path, choice: DatasetChoice) -> HubDataset | None:
    """The dataset that ``org/name`` or ``org/name@revision`` means on the hub; None where it means something here.

    A file or folder of that name comes first, and a name with the ending of a data file is never an id.

    Raises
    ------
    PromptError
        The hub does not have it; or the hub cannot be reached, and neither is it in the hub's cache.
    """
    found = _ID.fullmatch(str(source))
    if found is None or Path(source).exists() or is_data_file(str(source)):
        return None
    name, revision = found["name"], found["revision"]
    try:
        import huggingface_hub  # noqa: PLC0415 - takes a moment to load
    except ImportError:
        raise PromptError(
            f"{source} is not a file or folder; reading it as a dataset of the hub needs the datasets library", hint=_INSTALL
        ) from None
    folder = None
    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # the hub client raises errors of three libraries
        if type(error).__name__ in _NOT_THERE:
            raise PromptError(
                f"{source} is neither a file or folder here nor a dataset on the hub: {words_of(error)}",
                hint="check the path or the id; for a private or gated dataset run hf auth login",
            ) from error
        folder = _cached(name, revision, error)
        commit = folder.name
    origin = OriginRecord(dataset=name, revision=str(commit), config=choice.config, split=choice.split)
    return HubDataset(origin=origin, folder=folder)


def _cached(name: str, revision: str | None, unreachable: Exception) -> Path:
    import huggingface_hub  # noqa: PLC0415

    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception as error:  # as above
        raise PromptError(
            f"{name} is not a file or folder here, the hub cannot be reached ({words_of(unreachable)}), and the hub's "
            "cache does not contain the whole dataset",
            hint=f"check the path or the network; with a network, hf download --repo-type dataset {name} fills the cache",
        ) from error


def streamed_parts(dataset: HubDataset, names: PromptFields) -> Iterator[tuple[str, Iterator[dict[str, object]]]]:
    """The chosen splits with their rows, as ``datasets`` streams them; pictures and other binary columns are left out.

    Raises
    ------
    PromptError
        ``datasets`` is missing or too old, a split or configuration has to be chosen, or the network fails.
    """
    datasets = _library(dataset.name)
    origin = dataset.origin
    try:
        splits = datasets.load_dataset(origin.dataset, origin.config, revision=origin.revision, streaming=True)
    except Exception as error:  # of datasets, fsspec and the hub client
        raise _refusal(datasets, dataset, error) from error
    for split in choose(dataset.name, "splits", list(splits), "--split", origin.split):
        part = splits[split]
        if (features := getattr(part, "features", None)) is not None:
            kept = kept_columns(features.arrow_schema, prompt_fields(names))
            part = part.decode(False).remove_columns([column for column in features if column not in kept])
        yield f"{dataset.name} {split}", _rows(part, dataset)


def _rows(part: Any, dataset: HubDataset) -> Iterator[dict[str, object]]:  # noqa: ANN401 - an IterableDataset
    try:
        yield from part
    except Exception as error:  # as above
        download = f"hf download --repo-type dataset {dataset.origin.dataset} --revision {dataset.origin.revision}"
        is_value = isinstance(error, ArithmeticError | ValueError)  # that Python does not have, such as a date out of range
        raise PromptError(
            f"reading {dataset.name} from the hub failed: {words_of(error)}",
            hint=f"read its files instead, where a bad value costs only itself: {download}, then give the folder"
            if is_value
            else "nothing is committed yet: run the command again",
        ) from error


def _library(name: str) -> Any:  # noqa: ANN401 - an optional library
    try:
        import datasets  # noqa: PLC0415 - an extra
    except ImportError:
        raise PromptError(f"reading {name} from the hub needs the datasets library", hint=_INSTALL) from None
    if int(datasets.__version__.partition(".")[0]) < _LEAST_VERSION:
        raise PromptError(
            f"reading {name} from the hub needs datasets {_LEAST_VERSION} or newer, which runs no code of a dataset; "
            f"installed is {datasets.__version__}",
            hint="pip install -U datasets",
        )
    return datasets


def _refusal(datasets: Any, dataset: HubDataset, error: Exception) -> PromptError:  # noqa: ANN401 - an optional library
    origin = dataset.origin
    if "script" in str(error) and isinstance(error, RuntimeError):
        return PromptError(
            f"{dataset.name} is read by its own script, which embstore does not run",
            hint=f"many have a copy in Parquet: {origin.dataset}@refs/convert/parquet",
        )
    if isinstance(error, ValueError) and "onfig" in str(error):
        try:
            configs = list(datasets.get_dataset_config_names(origin.dataset, revision=origin.revision))
            choose(dataset.name, "configurations", configs, "--config", origin.config)
        except PromptError as asked:
            return asked
        except Exception as again:  # noqa: BLE001 - the first error says more
            error.add_note(str(again))
    return PromptError(
        f"{dataset.name} cannot be read from the hub: {words_of(error)}",
        hint="does datasets.load_dataset(..., streaming=True) read it? If not, download its files and give the folder",
    )
