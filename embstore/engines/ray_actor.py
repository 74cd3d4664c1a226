"""What runs on a worker of ``engines.ray``: it says who it is, starts a job, and answers with bytes, never an exception.

Ray would raise what a task raised as an error of its own, of a class made on the spot; here the driver decides what counts.
"""

from __future__ import annotations

from collections.abc import Callable


def worker_class() -> type:
    """The actor. Local, so that it travels by value: it must be able to say that another embstore is installed there."""

    class EmbstoreWorker:
        def hello(self, token: str, visible: str | None) -> bytes:
            import os  # noqa: PLC0415 - by value, nothing of this module is there
            import pickle  # noqa: PLC0415
            import socket  # noqa: PLC0415

            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible  # nothing has asked for a device yet
            version = found = None
            try:
                import embstore  # noqa: PLC0415

                version = embstore.__version__
                with open(token) as file:  # noqa: PTH123
                    found = file.read(64)
            except (ImportError, OSError):
                pass
            return pickle.dumps(("hello", f"{socket.gethostname()} (process {os.getpid()})", version, found))

        def begin(self, job: bytes, number: int) -> bytes:
            import pickle  # noqa: PLC0415

            def start() -> None:
                self.worker = pickle.loads(job).start(number)

            return self.answer(start)

        def run(self, packed: bytes) -> bytes:
            import pickle  # noqa: PLC0415

            task, following = pickle.loads(packed)
            return self.answer(lambda: self.worker.run(task, following=following, check=lambda: None))

        def answer(self, do: Callable[[], object]) -> bytes:
            import pickle  # noqa: PLC0415

            from embstore.core.errors import EmbstoreError  # noqa: PLC0415

            try:
                return pickle.dumps(("done", do()), protocol=5)
            except EmbstoreError as error:
                return pickle.dumps(("refused", type(error).__name__, error.message, error.hint))
            except Exception as error:  # noqa: BLE001 - the driver decides
                return pickle.dumps(("failed", type(error).__name__, str(error)[:2000]))

    return EmbstoreWorker
