"""What every operator shares: the runtime, architectures, orders, backends, argument checks, custom operators."""
