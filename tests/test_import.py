"""Importing the package is cheap and pulls in no other package's models."""

import subprocess
import sys


def test_attnlens_does_not_import_transformers():
    command = "import sys, attnlens, attnlens.interop; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
