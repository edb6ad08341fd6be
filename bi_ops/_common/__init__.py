"""What every operator family shares: the runtime, argument checks, providers, Triton helpers."""
