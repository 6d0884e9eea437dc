"""`agl`: serve, train, eval, run, doctor, air, rescore, export. Commands are thin layers over the Python API.

Progress and messages go to standard error, results to standard output; with --json one line of JSON.
Exit codes: 0 done, 1 an error with a sentence, 2 wrong usage.
"""

from __future__ import annotations

import sys

HINT = "agl needs {name}. Install it with: pip install '.[server]' (or '.[train]' to train on this machine)"


def main() -> None:
    """Entry point of the console script."""
    try:
        from agentlightning_server.cli.commands import app
    except ImportError as error:
        if (error.name or "").startswith("agentlightning"):
            raise
        sys.exit(HINT.format(name=error.name))
    from agentlightning.errors import AgentLightningError

    try:
        app()
    except AgentLightningError as error:
        sys.exit(f"agl: {error}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"agl: {place}{error.strerror or error}; name another folder, or see to its room and rights")
    except KeyboardInterrupt:
        print("agl: stopped; the same command goes on where a run was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
