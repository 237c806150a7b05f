"""cvmk: translation models small and fast enough to run live, and the kernels that make them so.

Importing this package costs nothing: torch is imported by ``cvmk.ops`` and by whatever needs it.
"""

__version__ = "0.1.0"
