"""`python -m dpocli`, which is how torchrun starts it."""

from dpocli.cli import main

if __name__ == "__main__":
    main()
