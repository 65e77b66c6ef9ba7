"""`python -m hesstrace_cli`."""

from hesstrace_cli.cli import main

if __name__ == "__main__":
    main()
