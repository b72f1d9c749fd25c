"""Attestation of a run: a chain of in-toto statements, one per stage, in DSSE envelopes."""
