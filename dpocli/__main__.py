"""The process: `dpocli`, and `python -m dpocli`, which is how torchrun starts it. Signals count from its first lines."""

from typing import NoReturn

from dpocli.distributed.signals import EarlyStop


def main() -> NoReturn:
    """Run the command line of this process."""
    early_stop = EarlyStop()
    from dpocli import cli  # a third of a second

    cli.main(early_stop=early_stop)


if __name__ == "__main__":
    main()
