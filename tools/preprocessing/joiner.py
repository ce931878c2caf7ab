"""Append finished parts to the unfinished output while others are still being made."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed import IndexedTotals, IndexedWriter, token_dtype
from tools.preprocessing.parts import WorkFolder, writing
from tools.preprocessing.plan import Planned, Request

_POLL_SECONDS = 0.1


class Joiner:
    """Joins parts in the order of the input, each as soon as it and all before it are in the work folder.

    A thread of its own copies the ids, within the kernel where that can be, so that little is left to do when the last
    part is made, by whatever process or rank. As a context manager it leaves nothing of an output not published.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, request: Request, planned: Planned) -> None:
        self._folder: WorkFolder = planned.folder
        self._order = [part.number for part in planned.run.parts]
        self._sentences = request.settings.split_sentences
        self._output = request.output_prefix
        self._stop = threading.Event()
        self._error: Exception | None = None
        dtype = token_dtype(planned.loaded.tokenizer.vocab_size)
        with writing(self._output), ExitStack() as stack:
            self.writers = [
                stack.enter_context(IndexedWriter(request.prefix(key), dtype=dtype, aside=self._folder.path))
                for key in request.settings.keys
            ]
            self._unfinished = stack.pop_all()
        self._thread = threading.Thread(target=self._run, name="join", daemon=True)
        self._thread.start()

    def __enter__(self) -> Joiner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._unfinished.close()

    def seal(self) -> list[IndexedTotals]:
        """Join what is left, once all parts are made, and flush the output to the disk; gives totals by key.

        Raises:
            DataError: the disk is full, or a part has lost its files.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        with writing(self._output):
            return [writer.seal() for writer in self.writers]

    def _run(self) -> None:
        """Be the thread."""
        try:
            with writing(self._output):
                for number in self._order:
                    while not self._folder.is_finished(number):
                        if self._stop.wait(_POLL_SECONDS):
                            return
                    if self._stop.is_set():
                        return
                    for key, writer in enumerate(self.writers):
                        self._append(writer, number, key)
        except Exception as error:  # raised by `seal`, in the thread that waits
            self._error = error

    def _append(self, writer: IndexedWriter, number: int, key: int) -> None:
        """Append one part's files of one key."""
        lengths = _map_numbers(self._folder.part_file(number, key, "len"))
        counts = _map_numbers(self._folder.part_file(number, key, "doc")) if self._sentences else None
        writer.add_part(self._folder.part_file(number, key, "bin"), lengths, counts)


def _map_numbers(path: Path) -> npt.NDArray[np.int32]:
    """Map a file of int32, perhaps an empty one, which the system does not map."""
    return np.memmap(path, mode="r", dtype="<i4") if path.stat().st_size else np.zeros(0, dtype="<i4")
