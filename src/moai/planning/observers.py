"""Two processes that observe plans, where one would take too long.

In: a function that observes a plan, and word of what will probably be asked of it next. Out: the same function, which
finds half of the work done. The second process is a copy of the first (a fork): it has the step's graph, and all that
is known of it, from the start. A process with several threads cannot be copied safely, and works alone.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from moai.plan.errors import PlanError
from moai.plan.family import Observe, Observed
from moai.plan.plan import Plan

# Longer than any observation takes: afterwards the other process is given up.
_WAIT_SECONDS = 60.0
_END_SECONDS = 5.0

Expect = Callable[[Plan, Plan], None]
_Answer = Observed | PlanError | RuntimeError


@contextmanager
def two_observers(observe: Observe) -> Iterator[tuple[Observe, Expect]]:
    """`observe`, and what is to be told of a plan that is about to be observed and of the probable next one."""
    if threading.active_count() > 1:
        yield observe, lambda plan, probable: None
        return
    both = _Both(observe)
    try:
        yield both.observe, both.expect
    finally:
        both.close()


class _Both:
    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._lost = False
        self._asked: Plan | None = None  # what the other process is at
        self._answers: dict[Plan, _Answer] = {}

    def observe(self, plan: Plan) -> Observed:
        if plan == self._asked:
            self._receive()
        answer = self._answers.pop(plan, None)
        if answer is None:
            return self._observe(plan)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def expect(self, plan: Plan, probable: Plan) -> None:
        if plan == self._asked or plan in self._answers or probable in self._answers or self._lost:
            return
        if self._asked is not None:
            self._receive()
        try:
            self._connected().send(probable)
            self._asked = probable
        except OSError:
            self._lose()

    def close(self) -> None:
        """The other process ends."""
        self._lose()

    def _connected(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("fork")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_answer, args=(self._connection, theirs, self._observe), daemon=True)
            self._process.start()
            theirs.close()
        return self._connection

    def _receive(self) -> None:
        """Waits for what the other process is at."""
        asked, self._asked = self._asked, None
        assert asked is not None and self._connection is not None
        try:
            if not self._connection.poll(_WAIT_SECONDS):
                raise EOFError
            self._answers[asked] = self._connection.recv()
        except (EOFError, OSError):
            self._lose()

    def _lose(self) -> None:
        self._lost, self._asked = True, None
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.terminate()
            self._process.join(_END_SECONDS)


def _answer(mine: Connection, theirs: Connection, observe: Observe) -> None:
    """The other process: it ends when nobody asks any more. `mine` is the end that the first process has."""
    mine.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it, too
    with suppress(EOFError, OSError):
        while True:
            plan = theirs.recv()
            try:
                answer: _Answer = observe(plan)
            except PlanError as error:
                answer = error
            except RuntimeError as error:
                answer = RuntimeError(str(error))  # of a kind that can be sent
            theirs.send(answer)
