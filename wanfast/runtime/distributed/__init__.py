"""Who holds what: the mesh of ranks and the exchanges between them."""
