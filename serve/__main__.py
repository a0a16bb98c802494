"""`python -m dynamo.serve [MODEL]` serves; `... frontend` and `... worker` start parts alone, `... config` prints settings."""

import sys

from dynamo.serve.command_line import parse_command_line
from dynamo.serve.config import LoadedConfig, render_toml
from dynamo.serve.errors import ConfigError, EngineDeadError, ModelLoadError, WorkerStartError
from dynamo.serve.roles import Role

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def main() -> int:
    """Runs the command line; errors of the user's settings are one sentence and exit code 2."""
    try:
        command = parse_command_line(sys.argv[1:])
        if command.show_config:
            print(render_toml(command.loaded))
            return 0
        return _run(command.role, command.loaded)
    except (ConfigError, ModelLoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except EngineDeadError as error:  # it could not be ended: the server goes without it
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_FAILED
    except WorkerStartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def _run(role: Role, loaded: LoadedConfig) -> int:
    # The packages of each part take a while: --help, config and wrong flags need not wait for them.
    if role is Role.WORKER:
        from dynamo.serve.worker import run_worker

        return run_worker(loaded.config)
    if role is Role.FRONTEND or loaded.config.fleet.workers is not None:
        from dynamo.serve.front_process import run_front

        return run_front(loaded)
    from dynamo.serve.lifecycle import run_server

    return run_server(loaded.config)


if __name__ == "__main__":
    sys.exit(main())
