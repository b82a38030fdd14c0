"""The command `sparsetune`, also as `python -m sparsetune`."""

import signal


def run() -> None:
    """Run the command; Ctrl-C ends it without a traceback while it is imported, and while the interpreter exits."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sparsetune.cli.main import main

    main()


if __name__ == "__main__":
    run()
