"""``python -m simba_lab``: the same as the console script ``simba-lab``."""

from simba_lab.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
