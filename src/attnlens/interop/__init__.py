"""Operators inside other packages; nothing here is imported by `import attnlens`."""
