"""Device facts and honest measurement; imports neither targets nor compressor."""
