"""Rows of many pieces of work, from some processes at a time that are forked, so that nothing is imported again."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

Piece = TypeVar("Piece")


def rows_of(
    pieces: Sequence[Piece], jobs: int, work: Callable[[Piece], Iterable[dict[str, Any]]], worth: Callable[[Any], str]
) -> list[dict[str, Any]]:
    """Return the rows of all pieces, in their order, and print each when it is there.

    Args:
        pieces: one after another goes to the next process.
        jobs: processes at a time.
        work: from a piece to its rows of plain values.
        worth: from a row to the word that it is printed with.

    Raises:
        SystemExit: a process failed.
    """
    receiver, sender = os.pipe()
    workers = []
    for first in range(jobs):
        workers.append(os.fork())
        if workers[-1] == 0:
            os.close(receiver)
            try:
                for place in range(first, len(pieces), jobs):
                    for row in work(pieces[place]):
                        os.write(sender, (json.dumps([place, row]) + "\n").encode())  # short enough to stay whole
                os._exit(0)
            except BaseException as error:
                print(f"{pieces[place]}: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(1)
    os.close(sender)
    rows = []
    with os.fdopen(receiver, encoding="utf-8") as lines:
        for line in lines:
            rows.append(json.loads(line))
            print(f"{worth(rows[-1][1])}: {rows[-1][1]}", flush=True)
    statuses = [os.waitpid(worker, 0)[1] for worker in workers]
    if any(statuses):
        raise SystemExit("a process failed: see above")
    return [row for _, row in sorted(rows, key=lambda found: found[0])]
