"""A program that takes a worker's place until horovodrun has counted the workers anew, and then starts it again.

Nothing but the standard library, since it is run by its path: `python _horovod_rejoin.py ARGUMENTS OF THE WORKER`.
"""

from __future__ import annotations

import http.client
import os
import sys

NUMBERS = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


def main() -> None:
    """Ask who this is now. horovodrun answers when each worker has asked or is gone, and there are enough places."""
    who = f"{os.environ['HOROVOD_HOSTNAME']}:{os.environ['HOROVOD_LOCAL_RANK']}"
    address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
    try:
        connection = http.client.HTTPConnection(address, int(port))
        connection.request("GET", f"/rank_and_size/{who}")
        answer = connection.getresponse()
        numbers = answer.read().decode().split(",")
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"horovodrun doesn't say who {who} is now ({type(error).__name__}: {error}); start again to go on")
    if answer.status != http.HTTPStatus.OK or len(numbers) != len(NUMBERS) or int(numbers[0]) < 0:
        sys.stderr.write(f"{who} is no longer part of the run, which has left this host or ended\n")
        return
    connection.close()
    os.environ.update({f"HOROVOD_{name}": number for name, number in zip(NUMBERS, numbers, strict=True)})
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # noqa: S606 - the worker's own command


if __name__ == "__main__":
    main()
