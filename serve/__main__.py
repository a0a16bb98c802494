"""`python -m dynamo.serve [MODEL]` serves; `python -m dynamo.serve config` prints the effective configuration."""

import sys

from dynamo.serve.command_line import parse_command_line
from dynamo.serve.config import render_toml
from dynamo.serve.errors import ConfigError, ModelLoadError

_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def main() -> int:
    """Runs the command line; errors of the user's settings are one sentence and exit code 2."""
    try:
        command = parse_command_line(sys.argv[1:])
        if command.show_config:
            print(render_toml(command.loaded))
            return 0
        # The server's packages take a while: --help, config and wrong flags need not wait for them.
        from dynamo.serve.lifecycle import run_server

        return run_server(command.loaded.config)
    except (ConfigError, ModelLoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
