"""DuQ quantizers: the arithmetic, the number of levels, and the first values of the intervals."""
