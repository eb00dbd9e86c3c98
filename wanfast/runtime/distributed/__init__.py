"""This package holds the mesh of ranks and the exchanges between ranks."""
