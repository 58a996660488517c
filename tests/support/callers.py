"""Callers of a server that say who they are, or nothing at all, and a look at whether they have waited too long."""

import threading
import time
from collections import Counter

from support.calls import SECONDS

from sft_cloud.identity import Identity, Limits


class Never:
    """A side that says nothing until it is let go."""

    def __init__(self, *messages):
        self._messages = list(messages)
        self._done = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        if self._messages:
            return self._messages.pop(0)
        self._done.wait(SECONDS)
        raise StopIteration

    def let_go(self):
        self._done.set()


def named(**limits):
    """An `identify` that takes the caller's word for who it is; all have the same limits."""

    def identify(context):
        return Identity(dict(context.invocation_metadata()).get("name", "anonymous"), Limits(**limits))

    return identify


class As:
    """The stub of a named caller."""

    def __init__(self, stub, name):
        self._stub, self._name = stub, name

    def __getattr__(self, method):
        return lambda *arguments, **options: getattr(self._stub, method)(
            *arguments, metadata=[("name", self._name)], **options
        )


class Announcing(dict):
    """The waits of a watch, whose comings can be waited for."""

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()
        self.so_far = Counter()

    def __setitem__(self, number, wait):
        with self.changed:
            super().__setitem__(number, wait)
            self.so_far[wait.reason] += 1
            self.changed.notify_all()

    def come(self, reason, count=1, so_far=0):
        """Returns when so many wait now, of so many or more in all."""
        with self.changed:
            come = self.changed.wait_for(
                lambda: sum(w.reason == reason for w in self.values()) >= count and self.so_far[reason] >= so_far,
                SECONDS,
            )
        assert come, f"nobody waits: {reason}"


def overdue(server, reason, seconds=1e6):
    """Ends what waits for this reason, as the watch does when so much time is over; returns how many were ended."""
    watch = server.deadlines
    watch._waits.come(reason)
    clock, watch._clock = watch._clock, lambda: time.monotonic() + seconds
    watch.look()
    watch._clock = clock
    return watch.ended[reason]
