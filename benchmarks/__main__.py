"""Every page in turn: `python -m benchmarks`. Each page takes arguments: `python -m benchmarks.latency --help`."""

from benchmarks import accuracy, latency


def main() -> None:
    accuracy.main(["--peers"])
    latency.main([])


if __name__ == "__main__":
    main()
