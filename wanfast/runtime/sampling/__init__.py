"""This package holds the mathematics of sampling: solvers, guidance and MagCache; it reads no weights or files."""
