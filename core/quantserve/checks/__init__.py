"""Everything that can be found wrong with a model before a GPU is touched, whatever its method."""
