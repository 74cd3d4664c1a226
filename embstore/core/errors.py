"""The error tree: every fault embstore expects, grouped by what the caller does next.

::

    EmbstoreError                    .kind (stable code)  .hint (next step)  .exit_code (command line)
    ├── ConfigError                  also ValueError        an option is wrong: change the command            2
    ├── PromptError                  also ValueError        the prompts file is wrong: correct it             1
    ├── ArrayError                   also ValueError        the array to import is wrong: correct it          1
    ├── ModelError                                          the model cannot be used: fix or replace it       1
    ├── RowError                     also ValueError        one prompt failed in the model                    1
    ├── BudgetError                                         too little memory or disk: no row was computed    1
    ├── StoreNotFoundError           also FileNotFoundError there is no store at this path                    1
    ├── StoreExistsError             also FileExistsError   the path is taken: --resume, or another path      1
    ├── WeightsError                 also ValueError        weights do not fit what training asked for        1
    │   ├── LengthMismatchError      weights and dataset have different lengths
    │   ├── KeyMismatchError         different prompts; its OrderMismatchError: the same ones in another order
    │   └── InvalidWeightsError      not a finite, non-negative, normalised float32 vector
    ├── CorruptStoreError                                   bytes are not what was committed: verify          3
    ├── IdentityMismatchError        also ValueError        the input differs from the store's                4
    ├── StoreLockedError                                    another writer is alive: wait                     5
    ├── IncompleteStoreError                                unfinished: build --resume                        6
    ├── StorageError                 also OSError           the file system failed: free space, --resume     6(*)
    ├── EngineError                                         workers are lost, or one task fails: --resume     6
    └── BuildInterruptedError                               stopped after a clean commit: --resume          130

(*) 1 in a command that makes no store: there is nothing to resume.

Programs may compare ``kind``: values are added, never changed. A message says what happened, where, and both values; the
hint is the next command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; scripts may rely on these numbers."""

    OK = 0
    ERROR = 1
    USAGE = 2
    CORRUPT = 3
    IDENTITY = 4
    LOCKED = 5
    INCOMPLETE = 6
    INTERRUPTED = 130


class EmbstoreError(Exception):
    """Base of every expected fault.

    Parameters
    ----------
    message
        What happened, where, and both values; one line.
    hint
        The next step for the person reading it; one line, or None.
    """

    kind: str = "error"
    exit_code: ExitCode = ExitCode.ERROR

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        # OSError subclasses would otherwise print their errno tuple
        return self.message


class ConfigError(EmbstoreError, ValueError):
    """An option or a combination of options is not valid."""

    kind = "config"
    exit_code = ExitCode.USAGE


class PromptError(EmbstoreError, ValueError):
    """The prompts file cannot be read, or breaks a rule that holds for the whole file."""

    kind = "prompts"


class ArrayError(EmbstoreError, ValueError):
    """The array to import cannot be read, or has no usable rows."""

    kind = "array"


class ModelError(EmbstoreError):
    """The model or tokenizer is missing, unsafe to load, or of a kind that embstore does not support."""

    kind = "model"


class RowError(EmbstoreError, ValueError):
    """A prompt has no usable row (no tokens, a non-finite value, or a zero norm)."""

    kind = "row"


class BudgetError(EmbstoreError):
    """Memory or disk space does not suffice; found before work began."""

    kind = "budget"


class StoreNotFoundError(EmbstoreError, FileNotFoundError):
    """There is no store at the path."""

    kind = "store-not-found"


class StoreExistsError(EmbstoreError, FileExistsError):
    """The path already contains a store (or other files)."""

    kind = "store-exists"


class CorruptStoreError(EmbstoreError):
    """Bytes on disk are not the bytes that were committed."""

    kind = "corrupt"
    exit_code = ExitCode.CORRUPT


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldMismatch:
    """One identity field with the value in the store and the value that was given."""

    field: str
    stored: object
    given: object

    def __str__(self) -> str:
        return f"{self.field}: the store has {self.stored}, given {self.given}"


class IdentityMismatchError(EmbstoreError, ValueError):
    """The input differs from what the store was made from; nothing was written."""

    kind = "identity-mismatch"
    exit_code = ExitCode.IDENTITY

    def __init__(self, mismatches: Sequence[FieldMismatch], *, hint: str | None = None, reused: str | None = None) -> None:
        """``reused`` names the store given to ``--reuse``, if its settings differ and not those of the store itself."""
        self.mismatches = tuple(mismatches)
        lines = "; ".join(str(mismatch) for mismatch in self.mismatches)
        refused = "this store was made from a different input" if reused is None else f"rows of {reused} cannot be reused"
        super().__init__(
            f"{refused} ({lines}); nothing was written" if reused is None else f"{refused} ({lines}); no row was written",
            hint=hint or "use the settings of the store, or build into another --out",
        )


class StoreLockedError(EmbstoreError):
    """Another process writes this store, or the file system cannot lock."""

    kind = "locked"
    exit_code = ExitCode.LOCKED


class IncompleteStoreError(EmbstoreError):
    """The store is not finished, so its rows and weights are not served."""

    kind = "incomplete"
    exit_code = ExitCode.INCOMPLETE


class StorageError(EmbstoreError, OSError):
    """The file system refused an operation; everything committed so far is safe."""

    kind = "storage"
    exit_code = ExitCode.INCOMPLETE


class EngineError(EmbstoreError):
    """Workers cannot start, do not see the store, or one task fails on each of them; everything committed so far is safe."""

    kind = "engine"
    exit_code = ExitCode.INCOMPLETE


class BuildInterruptedError(EmbstoreError):
    """The build received a stop signal and ended between two commits."""

    kind = "interrupted"
    exit_code = ExitCode.INTERRUPTED


class WeightsError(EmbstoreError, ValueError):
    """The weights cannot be used as requested."""

    kind = "weights"


class LengthMismatchError(WeightsError):
    """Weights and dataset differ in length."""

    kind = "weights-length"


class KeyMismatchError(WeightsError):
    """Weights and dataset contain different prompts."""

    kind = "weights-keys"


class OrderMismatchError(KeyMismatchError):
    """Weights and dataset contain the same prompts in different orders."""

    kind = "weights-order"


class InvalidWeightsError(WeightsError):
    """The array is not a finite, non-negative, normalised float32 vector."""

    kind = "weights-invalid"
