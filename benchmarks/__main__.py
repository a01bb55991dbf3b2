"""Every benchmark of the repository: `python -m benchmarks`."""

import importlib
import pathlib


def main() -> None:
    for path in sorted(pathlib.Path(__file__).parent.glob("bench_*.py")):
        print(f"\n## {path.stem.removeprefix('bench_')}")
        importlib.import_module(f"benchmarks.{path.stem}").main()


if __name__ == "__main__":
    main()
