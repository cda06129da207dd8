"""Show runs in progress on a local web page: losses, speed, experts, timeline, samples and events.

It reads the run folders only. Runs may be added to a folder of runs while the page is open.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fira import cli
from fira.value_types import PathName, Port, flag_type

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    runs_help = "run folders, or folders that contain some (default: runs)"
    parser.add_argument("runs", nargs="*", type=PathName, default=["runs"], metavar="RUN", help=runs_help)
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0: all networks (default: %(default)s)")
    parser.add_argument("--port", type=flag_type(Port), default=8050, help="0: a free one (default: %(default)s)")
    options = parser.start(arguments)
    from fira.watching.watch_server import LOOPBACK, FollowedRuns, make_server

    runs = FollowedRuns([Path(run) for run in options.runs])
    with make_server(runs, options.host, options.port) as server, suppress(KeyboardInterrupt):
        port = server.server_address[1]
        host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
        if options.host not in LOOPBACK:
            logger.warning("--host %s: everyone in the network can read logs, settings and samples", options.host)
        count = len(runs.overviews())
        found = f"{count} run{'s' * (count != 1)}"
        logger.info("%s; open http://%s:%d/ in a browser; Ctrl-C ends", found, host, port)
        server.serve_forever()
