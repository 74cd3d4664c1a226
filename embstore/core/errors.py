"""The error tree: every fault embstore expects, grouped by what the caller does next.

::

    EmbstoreError                    .kind (stable code)  .hint (next step)  .exit_code (command line)
    ├── ConfigError                  also ValueError        an option is wrong: change the command            2
    ├── PromptError                  also ValueError        the prompts file is wrong: mend it                1
    ├── ArrayError                   also ValueError        the array to import is wrong: mend it             1
    ├── ModelError                                          the model cannot be used: pick or mend it         1
    ├── RowError                     also ValueError        one prompt failed in the model                    1
    ├── BudgetError                                         memory or disk cannot fit: nothing was written    1
    ├── StoreNotFoundError           also FileNotFoundError no store there                                    1
    ├── StoreExistsError             also FileExistsError   a store is there: --resume, or another path       1
    ├── WeightsError                 also ValueError        weights do not fit what training asked for        1
    │   ├── LengthMismatchError      weights and dataset have different lengths
    │   ├── KeyMismatchError         other prompts; its OrderMismatchError: the same ones in another order
    │   └── InvalidWeightsError      not a finite, non-negative, normalised float32 vector
    ├── CorruptStoreError                                   bytes are not what was committed: verify          3
    ├── IdentityMismatchError        also ValueError        a different input than the store's                4
    ├── StoreLockedError                                    another writer is alive: wait                     5
    ├── IncompleteStoreError                                unfinished: build --resume                        6
    ├── StorageError                 also OSError           the file system said no: free space, --resume     6
    ├── EngineError                                         workers are gone, or fail at one task: --resume   6
    └── BuildInterruptedError                               stopped after a clean commit: --resume          130

``kind`` is append-only: programs may compare it. Messages say what, where and both values; ``hint`` is the next command.
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
    """The prompts file cannot be read, or breaks a rule that no line may break."""

    kind = "prompts"


class ArrayError(EmbstoreError, ValueError):
    """The array to import cannot be read, or holds no rows that can be."""

    kind = "array"


class ModelError(EmbstoreError):
    """The model or tokenizer is missing, unsafe to load, or of a shape embstore cannot pool."""

    kind = "model"


class RowError(EmbstoreError, ValueError):
    """A prompt gave no usable row (no tokens, a non-finite value, or a zero norm)."""

    kind = "row"


class BudgetError(EmbstoreError):
    """Memory or disk space does not suffice; found before work began."""

    kind = "budget"


class StoreNotFoundError(EmbstoreError, FileNotFoundError):
    """The path holds no store."""

    kind = "store-not-found"


class StoreExistsError(EmbstoreError, FileExistsError):
    """The path holds a store (or other files) already."""

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
        """``reused`` is the store whose rows were to be taken over, where it is that one's input that differs."""
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
    """The build was asked to stop and did so between two commits."""

    kind = "interrupted"
    exit_code = ExitCode.INTERRUPTED


class WeightsError(EmbstoreError, ValueError):
    """The weights cannot be used as asked."""

    kind = "weights"


class LengthMismatchError(WeightsError):
    """Weights and dataset differ in length."""

    kind = "weights-length"


class KeyMismatchError(WeightsError):
    """Weights and dataset are about other prompts."""

    kind = "weights-keys"


class OrderMismatchError(KeyMismatchError):
    """Weights and dataset are about the same prompts, in another order."""

    kind = "weights-order"


class InvalidWeightsError(WeightsError):
    """The array is not a finite, non-negative, normalised float32 vector."""

    kind = "weights-invalid"
