"""What the service needs beside the package itself, a requirement a line: python requirements.py pyproject.toml serve.

The package's dependencies without torch, which only training and the PyTorch engine import, and the extras that are named.
"""

import re
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *(entry for extra in sys.argv[2:] for entry in project["optional-dependencies"][extra])]
print("\n".join(entry for entry in wanted if re.match(r"[A-Za-z0-9._-]+", entry).group() not in ("torch", "cvmk")))
