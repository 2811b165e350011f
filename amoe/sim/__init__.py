"""The virtual shell: the workers' real cores on modelled devices and links, in modelled time."""
