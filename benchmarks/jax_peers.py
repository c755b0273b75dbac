"""The speed benchmarks against the JAX peers, in a venv that has them instead of the torch ones.

    python -m benchmarks.jax_peers [--smoke]

The same calls as ``python -m benchmarks``; the figures join those in the same file.
"""

import sys

from benchmarks.__main__ import main

if __name__ == "__main__":
    main(sys.argv[1:])
