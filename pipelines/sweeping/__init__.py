"""The parts of a sweep: what is tried, how trials run, what is made of their results."""
