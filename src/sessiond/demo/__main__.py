"""argv -> the demonstration -> exit code: 0 every promise kept, 1 one was not, 2 it could not be shown."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from sessiond.demo.screen import Screen

PROMISE_BROKEN = 1
NOT_SHOWN = 2
INTERRUPTED = 130


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("--out", default="sessiond-demo", show_default=True, metavar="DIR", help="Folder for data and results.")
@click.option("--quick", is_flag=True, help="The same steps with less in them.")
def command(files: tuple[str, ...], out: str, quick: bool) -> int:
    """Show what sessiond promises: import conversations, kill -9 under load, recover; lose the disk, recover; measure.

    FILE: conversations of the OpenAI chat format, one {"id", "messages"} a line. Without one, the sample set.
    """
    try:
        import sessiond.core
    except ImportError as error:
        return _failed(f"The compiled core is missing: {error}.", "Build it: make build")
    del sessiond
    from sessiond.cli import exits
    from sessiond.demo import show
    from sessiond.demo.load import Stalled
    from sessiond.errors import SessiondError
    from sessiond.testing import StartFailed

    folder, screen = Path(out), Screen()
    try:
        screen.title(f"sessiond: what it promises, shown on this machine ({'10 s' if quick else 'less than a minute'})")
        show.prepare(folder)
        figures = show.run(screen, files, folder, show.Plan.quick() if quick else show.Plan())
        show.summary(screen, figures, folder)
        show.next_command(screen, folder, figures.facts["longest_session"])
    except show.Refused as error:
        return _failed(str(error), error.remedy, error.code)
    except StartFailed as error:
        return _failed(str(error), f"The lines above are the daemon's own; all of them are in {folder / show.LOG}.")
    except Stalled as error:
        return _failed(str(error), f"What the daemon said is in {folder / show.LOG}.")
    except SessiondError as error:
        return _failed(f"{error.reason}: {error.message}", error.remedy)
    except Exception as error:
        defect = exits.defect(error)
        return _failed(defect.message, defect.remedy)
    return PROMISE_BROKEN if figures.broken else 0


def _failed(what: str, remedy: str, code: int = NOT_SHOWN) -> int:
    print(f"\nFailed: {what}\nRemedy: {remedy}", file=sys.stderr)
    return code


def main() -> int:
    """Run it; the exit code."""
    # As Ctrl-C, so that the daemon ends with it.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code = command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return NOT_SHOWN
    except (click.Abort, KeyboardInterrupt):
        print("\nStopped; no process is left behind.", file=sys.stderr)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
