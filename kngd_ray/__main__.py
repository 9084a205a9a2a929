"""``python -m kngd_ray``: the command line without its script."""

from kngd_ray.cli.app import main

if __name__ == "__main__":
    main()
