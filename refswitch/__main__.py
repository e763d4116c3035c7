# May import: refswitch.cli.
"""`python -m refswitch` is the same as the command `refswitch`."""

from refswitch.cli.main import main

if __name__ == "__main__":
    main()
