"""attnlens: attention mechanisms through the lens of numerical methods.

Importing the package has no effect and costs nothing: every heavy import lives where it is used.
"""

__version__ = "0.1.0"
