"""HTML report of a run: one self-contained page from the artifacts of the stages."""
