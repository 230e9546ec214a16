"""Models that others have trained, in the classes of this package."""
