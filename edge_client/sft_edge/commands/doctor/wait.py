"""Waiting for a server that is absent or full, as a run does with `--wait`."""

from __future__ import annotations

import sys

from sft.errors import LinkError, ServerFullError, ServerUnavailableError
from sft_edge.commands.doctor.server import room_of
from sft_edge.link import Retries, Wake, retry_policy_of, transport_of
from sft_edge.options import LinkOptions

_ANSWER_SECONDS = 20.0


def wait_for_room(server: str, link: LinkOptions) -> None:
    """Returns when the server says that it has room, when waiting does not help, and when `link.wait` is over: whoever
    looks at it then finds out which.
    """
    retries = Retries(retry_policy_of(link), Wake(), _tell, link.wait)
    transport = transport_of(server, link)
    try:
        while True:
            try:
                room = room_of(transport.inquiry(_ANSWER_SECONDS).status())
                if room.verdict != "failed":
                    return
                raise ServerFullError(f"{server} has no room: {room.found}")
            except (ServerUnavailableError, ServerFullError) as error:
                retries.after(error)
                transport.renew()
    except LinkError:
        return
    finally:
        transport.close()


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
