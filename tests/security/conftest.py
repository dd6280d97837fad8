"""The program `disttrain` as the tests of the launcher have it."""

from tests.launch.conftest import mpi, program

__all__ = ["mpi", "program"]
