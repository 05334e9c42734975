"""One of several processes of a run: `python -m luthier.cli.rank RUN`; the command that started them watches."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """Train this process's share of the run; only the leading process says anything."""
    from luthier.cli.live import train_and_tell
    from luthier.cli.output import print_error, wants_json
    from luthier.errors import LuthierError
    from luthier.runs.run import open_run

    folder, flags = arguments[0], arguments[1:]
    try:
        return train_and_tell(
            open_run(folder),
            resume="--resume" in flags,
            allow_changed="--allow-changed" in flags,
            as_json=wants_json(flags),
        )
    except LuthierError as error:
        print_error(error, as_json=wants_json(flags))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
