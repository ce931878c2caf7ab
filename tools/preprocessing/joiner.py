"""Append finished parts to the unfinished output while others are still being made."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from types import TracebackType

from megatron_ext.data.indexed import IndexedTotals, IndexedWriter, read_numbers, token_dtype
from tools.preprocessing.parts import Finished, WorkFolder, endings, writing
from tools.preprocessing.plan import Planned, Request

FLUSH_BYTES = 32 << 20
"""Ids that are flushed to the disk at once: little to wait for at the end, and few part files that lie about."""

_POLL_SECONDS = 0.02


class Joiner:
    """Joins parts in the order of the input, each as soon as it and all before it are in the work folder.

    A thread of its own copies the ids, within the kernel where that can be, flushes them, and then drops the parts'
    own copies: so these seldom reach the disk, their memory is used again, and little is left to do when the last part
    is made, by whatever process or rank. As a context manager it leaves of an output not published only what a
    later run can go on with.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, request: Request, planned: Planned) -> None:
        self._folder: WorkFolder = planned.folder
        self._finished: Finished = planned.finished
        self._order = [part.number for part in planned.run.parts]
        self._endings = endings(sentences=request.settings.split_sentences)
        self._output = request.output_prefix
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._unflushed: list[int] = []
        self._unflushed_bytes = 0
        dtype = token_dtype(planned.loaded.tokenizer.vocab_size)
        with writing(self._output), ExitStack() as stack:
            self.writers = []
            for key, name in enumerate(request.settings.keys):
                ids = self._folder.joined_file(key)
                with ids.open("ab") as file:  # a kill may have left a part of a part at its end
                    file.truncate(self._finished.joined_bytes[key])
                writer = IndexedWriter(request.prefix(name), dtype=dtype, aside=self._folder.path, ids=ids)
                self.writers.append(stack.enter_context(writer))
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
                    self._append(number)
                    if self._unflushed_bytes >= FLUSH_BYTES:
                        self._flush()
        except Exception as error:  # raised by `seal`, in the thread that waits
            self._error = error

    def _append(self, number: int) -> None:
        """Append one part."""
        for key, writer in enumerate(self.writers):
            ids, *counts = (self._folder.part_file(number, key, ending) for ending in self._endings)
            numbers = [read_numbers(path) for path in counts]
            if number < self._finished.joined:
                writer.add_lengths(*numbers)
            else:
                self._unflushed_bytes += os.stat(ids).st_size
                writer.add_part(ids, *numbers)
        self._unflushed.append(number)

    def _flush(self) -> None:
        """Flush the joined ids, after which the parts' own are needed no more."""
        for writer in self.writers:
            writer.flush_ids()
        for number in self._unflushed:
            for key in range(len(self.writers)):
                self._folder.part_file(number, key, "bin").unlink(missing_ok=True)
        self._unflushed, self._unflushed_bytes = [], 0
