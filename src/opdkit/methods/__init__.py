"""Published methods: one file each, a docstring and one function of the same name that returns a `Method`."""
